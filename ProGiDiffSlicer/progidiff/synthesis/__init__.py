"""Synthetic training images: procedural phantoms and domain-randomised painting on real label maps."""

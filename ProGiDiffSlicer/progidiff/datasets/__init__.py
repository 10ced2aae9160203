"""Labelled images: nnU-Net folders, slice folders with a manifest, and public evaluation sets."""

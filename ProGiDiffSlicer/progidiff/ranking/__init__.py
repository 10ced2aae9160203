"""Ranking of proposals without ground truth, ensembles of them, and when to stop sampling."""

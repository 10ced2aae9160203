"""Active learning: which volume of a folder is worth a person's time next."""

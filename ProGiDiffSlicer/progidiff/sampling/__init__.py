"""Sampling of proposals: noise fields, the model's pixel grid, conditioning, denoising, and the engine above them."""

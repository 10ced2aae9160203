"""The fixtures of the engine's tests that the laboratory's tests share."""

from Testing.conftest import shared_data
from Testing.engine.conftest import cpu_clock, headed_folder, responsive_folder, tiny_model_folder, tiny_sd

__all__ = ["cpu_clock", "headed_folder", "responsive_folder", "shared_data", "tiny_model_folder", "tiny_sd"]

"""The benchmark: ProGiDiff's engine beside diffusers' own ``StableDiffusionControlNetPipeline``.

What is compared, in one process, on the same weights in memory, the same image, prompt, noise, schedule, steps and threads:

* **The engine**: one request for N proposals on one slice. The clock runs from the call to the last ranked mask at the
  slice's own pixels. It encodes the slice in that time (each run sees a slice that is new to it), and also computes
  probabilities, agreement and ranking, which the pipeline does not give. The model is loaded and the volume is set before.
* **The worker**: the same request through a worker process and its pipe.
* **The pipeline in a loop**: ``StableDiffusionControlNetPipeline.__call__`` once per proposal, as its documentation shows
  it, with ``guidance_scale=1`` (one network pass per step, as the engine does). It encodes the prompt in every call and
  hands the condition image to the ControlNet at every step, so the model's image encoder stands where the stock hint block
  would and runs there. Masks are decoded by the model's real autoencoder. The clock also covers bringing the slice to the
  model's grid (once) and each mask back to the slice's own pixels. The noise is drawn beforehand for both.
* **Variants of the pipeline**, so that nobody is misled about where the difference comes from: guidance 7.5, its default
  (two passes per step; it changes the masks); the hint encoded once outside the loop, which the stock pipeline cannot do by
  itself; and one call with ``num_images_per_prompt=N``, its fair batched use.

The runs are interleaved, their order rotates from repeat to repeat, and every figure is a median with its range. A speed-up
is the median of the ratios within a repeat, so that a machine that slows down for a while slows both sides.
"""

from __future__ import annotations

from experiments.bench.report import as_text
from experiments.bench.results import BenchReport
from experiments.bench.run import BenchSettings, run_bench

__all__ = ["BenchReport", "BenchSettings", "as_text", "run_bench"]

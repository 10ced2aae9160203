"""The benchmark's figures as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and range of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One contestant.

    Attributes:
        key: name in the JSON output.
        title: name in the table.
        proposals_per_second: N divided by the seconds that all of them took.
        total_s: seconds for all proposals.
        first_proposal_s: seconds to the first mask, the image being there.
        image_s: seconds to hand over a new image beforehand (worker only).
        peak_memory_mb: most memory during a run, MiB: resident memory of the process, or device memory on CUDA.
        working_memory_mb: how much of it the run added to the loaded model; ``None`` for the worker's own process.
        engine_speedup: how many times faster per proposal the engine was, repeat by repeat; ``None`` for the engine itself.
        problem: why there are no figures.
    """

    key: str
    title: str
    proposals_per_second: Spread | None = None
    total_s: Spread | None = None
    first_proposal_s: Spread | None = None
    image_s: Spread | None = None
    peak_memory_mb: float | None = None
    working_memory_mb: float | None = None
    engine_speedup: Spread | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Agreement:
    """Whether both sides sample the same masks from the same noise.

    Attributes:
        proposals: masks compared.
        equal_pixels: share of pixels that are the same when both sides' latents are decoded alike.
        lowest_dice: lowest Dice of a pair then (two empty masks count as 1).
        autoencoder_dice: mean Dice of the engine's masks and those that the pipeline decodes with the autoencoder; ``None``
            where the engine uses the autoencoder as well.
    """

    proposals: int
    equal_pixels: float
    lowest_dice: float
    autoencoder_dice: float | None = None


@dataclass(frozen=True)
class ModelResult:
    """All rows of one model.

    Attributes:
        model_id: the card's identifier.
        parameters: of all networks.
        image_size: pixels per side of the model's grid.
        slice_shape: rows and columns of the benchmark's slices.
        target: what was asked for.
        dtype: floating-point type of the networks.
        decoder: what the engine decodes with.
        rows: one per contestant.
        agreement: the check that both sample the same.
    """

    model_id: str
    parameters: int
    image_size: int
    slice_shape: tuple[int, int]
    target: str
    dtype: str
    decoder: str
    rows: tuple[Row, ...]
    agreement: Agreement

    def row(self, key: str) -> Row:
        """The row of a contestant."""
        return next(row for row in self.rows if row.key == key)


@dataclass(frozen=True)
class BenchReport:
    """The whole benchmark.

    Attributes:
        machine: device, threads, library versions, and the load before the start.
        proposals: N.
        steps: denoising steps.
        repeats: runs behind each median.
        models: one result per model.
        notes: what a reader must know to read the figures rightly.
    """

    machine: dict[str, str | int | float]
    proposals: int
    steps: int
    repeats: int
    models: tuple[ModelResult, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

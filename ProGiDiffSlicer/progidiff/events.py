"""What the engine reports while it works: plain data, shared by the engine, the worker protocol and its clients.

Standard library and numpy only, so that a client inside Slicer can import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

RankingMethod = Literal["soft_dice", "medoid"]
SchedulerName = Literal["ddim", "dpmsolver++"]


@dataclass(frozen=True)
class ProposeRequest:
    """One request for proposals on the current image.

    Attributes:
        targets: canonical target names of the model's vocabulary, e.g. ``("liver", "left kidney")``.
        proposals: number of samples N per target (the maximum when ``adaptive``).
        top_k: how many distinct proposals are put forward.
        steps: denoising steps, 1-100 (4 is the default model's design point).
        scheduler: ``"ddim"`` or ``"dpmsolver++"``.
        seed: seed of the noise fields; proposal i is the same whatever N, batch size or device count.
        slices: half-open range along the slice axis, or ``None`` for all slices.
        adaptive: sample in blocks until the consensus has settled.
        batch_size: most samples in one network call, or ``None`` for automatic.
        ranking: how proposals are scored without ground truth.
        everywhere: also draw a target on slices where the model's segmentation head finds it unlikely; otherwise so many of
            the proposals are empty there as it is unlikely.
    """

    targets: tuple[str, ...]
    proposals: int = 16
    top_k: int = 3
    steps: int = 4
    scheduler: SchedulerName = "ddim"
    seed: int = 0
    slices: tuple[int, int] | None = None
    adaptive: bool = False
    batch_size: int | None = None
    ranking: RankingMethod = "soft_dice"
    everywhere: bool = False


@dataclass(frozen=True)
class ImageInfo:
    """What the engine made of an image: its content hash and its slice plan."""

    content_hash: str
    plane: str
    slice_count: int
    slice_shape: tuple[int, int]
    spacing_rc: tuple[float, float]
    slice_spacing: float


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of the running request; ``fraction`` is in [0, 1], ``eta_s`` in seconds."""

    phase: str
    fraction: float
    slice_index: int | None = None
    slices_done: int = 0
    slices_total: int = 0
    target: str | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class SliceEvent:
    """Proposals of one target on one slice, in the canonical slice view at the image's own resolution.

    Attributes:
        target: canonical target name.
        slice_index: index along the slice axis.
        first_proposal: index of ``masks[0]``; a slice may arrive in several blocks.
        masks: bool (n, rows, columns).
        agreement: float32 (rows, columns), share of proposals 0..first_proposal+n that contain the pixel; ``None`` in the
            middle of a block. Adaptive sampling sends one for each of its blocks; the last one counts.
        mean_probability: float32 (rows, columns), mean of the proposals' probabilities; ``None`` likewise.
        preview: an early look (fewer proposals than asked for), to be replaced by a later event.
    """

    target: str
    slice_index: int
    first_proposal: int
    masks: np.ndarray
    agreement: np.ndarray | None = None
    mean_probability: np.ndarray | None = None
    preview: bool = False


@dataclass(frozen=True)
class RankingEvent:
    """The proposals of one target over the whole requested extent, ranked without ground truth.

    Attributes:
        target: canonical target name.
        order: proposal indices, best first (representatives of near-duplicate groups only).
        scores: score of each proposal by index, in [0, 1].
        groups: near-duplicates (pairwise Dice above 0.98), one list per entry of ``order``, representative first.
        top_k: the k best representatives; ``random_pick`` is one of them, drawn with the request's seed (RandTop-k).
        millilitres: volume of each proposal by index.
        empty: whether each proposal is empty; ``empty_share`` is their share.
        mean_pairwise_dice: diversity (1 = all alike).
        stop_reason: why sampling ended, as a sentence.
    """

    target: str
    order: list[int]
    scores: list[float]
    groups: list[list[int]]
    top_k: list[int]
    random_pick: int
    millilitres: list[float]
    empty: list[bool]
    empty_share: float
    mean_pairwise_dice: float
    stop_reason: str


#: Codes of warnings about an image as a whole, the most important first.
IMAGE_WARNINGS = ("plane", "values", "values_unknown", "values_corrected", "values_kept", "modality")


@dataclass(frozen=True)
class WarningEvent:
    """Something the user should know that did not stop the request."""

    code: str
    message: str


@dataclass(frozen=True)
class DoneEvent:
    """The request is complete. Times in seconds, memory in MiB."""

    model_id: str
    proposals: int
    timing: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    adapter_id: str | None = None


Event = ProgressEvent | SliceEvent | RankingEvent | WarningEvent | DoneEvent

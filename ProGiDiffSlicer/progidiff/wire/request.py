"""What is asked of the engine: one record of its options, the same from the panel or the command line to the sampler.

Whoever offers, shows or writes down a request goes through its fields, so that a new one appears there by itself.
It needs nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

RankingMethod = Literal["soft_dice", "medoid"]
SchedulerName = Literal["ddim", "dpmsolver++"]


@dataclass(frozen=True)
class Range:
    """Bounds, both included: of a number, of the characters of a text, of the items of a list."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        """The same bounds for a document of pydantic that holds such a value."""
        schema = handler(source)
        low, high = ("ge", "le") if schema["type"] in ("int", "float") else ("min_length", "max_length")
        return {**schema, low: self.low, high: self.high}


Place = Annotated[int, Range(0, 2**31)]
Proposals = Annotated[int, Range(1, 1024)]


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
        keep_pieces: leave proposals of a stack as they were sampled, with islands and holes.
    """

    targets: Annotated[tuple[Annotated[str, Range(0, 200)], ...], Range(1, 64)]
    proposals: Proposals = 16
    top_k: Proposals = 3
    steps: Annotated[int, Range(1, 100)] = 4
    scheduler: SchedulerName = "ddim"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    slices: tuple[Place, Place] | None = None
    adaptive: bool = False
    batch_size: Annotated[int, Range(1, 65_536)] | None = None
    ranking: RankingMethod = "soft_dice"
    everywhere: bool = False
    keep_pieces: bool = False

    def problem(self) -> str | None:
        """What is wrong with the fields together, as a sentence."""
        if self.slices is not None and self.slices[0] >= self.slices[1]:
            return 'The field "slices" of a propose message must be a start and a larger stop.'
        return None

    def unusual(self, *told: str) -> Iterator[str]:
        """What was asked for otherwise than by default, in words, such as "everywhere"; but for the fields ``told``."""
        for field in fields(ProposeRequest):
            value = getattr(self, field.name)
            if field.name not in told and value not in ("", field.default):
                words = field.name.replace("_", " ")
                yield words if value is True else f"{words} {value}"

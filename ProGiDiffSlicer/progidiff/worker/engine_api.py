"""What the worker needs of an engine. The real one is ``progidiff.sampling.engine.Engine``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from progidiff.wire.frames import Array
from progidiff.wire.messages import Event, ImageInfo, ProposeRequest


class Card(Protocol):
    """The part of a model card that the worker speaks of."""

    @property
    def model_id(self) -> str: ...

    @property
    def vocabulary(self) -> Sequence[str]: ...

    def to_dict(self) -> dict[str, Any]: ...


class AdapterCard(Protocol):
    """The part of an adapter's card that the worker speaks of."""

    @property
    def adapter_id(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


class Engine(Protocol):
    """One loaded model, maybe with an adapter, and its current image."""

    @property
    def card(self) -> Card: ...

    @property
    def adapter(self) -> AdapterCard | None: ...

    def load_adapter(self, folder: Path, even_if_worse: bool = False) -> AdapterCard:
        """Use an adapter; where it is refused (``AdapterError``), what was in use stays in use."""

    def unload_adapter(self) -> None:
        """Go back to the base model."""

    def set_image(
        self,
        array_kji: Array,
        affine: Array,
        modality: str | None,
        plane: str | None = None,
        correct_values: bool = False,
    ) -> ImageInfo:
        """Make a volume the current image."""

    def propose(self, request: ProposeRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        """Emit proposals; raise ``CancelledError`` soon after ``cancelled()`` turns true."""


# Model folder (None: the bundled model), device, progress(phase, fraction) -> engine.
EngineFactory = Callable[[Path | None, str, Callable[[str, float], None]], Engine]


def load_engine(folder: Path | None, device: str, progress: Callable[[str, float], None]) -> Engine:
    """Load the real engine; torch is imported here and not before."""
    progress("starting", 0.0)
    from progidiff.sampling.engine import Engine as DiffusionEngine

    engine: Engine = DiffusionEngine.load(folder, device, progress)
    return engine

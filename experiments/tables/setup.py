"""What every table is given and gives back, and how it is written and printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.samples import SampleSettings, SampleStore
from experiments.shared_slices import load_shared
from progidiff.datasets.slices import LabelledSlice
from progidiff.errors import InputError, OutputError
from progidiff.places import atomic_file
from progidiff.sampling.engine import Engine, weights_key


def _say_nothing(line: str) -> None:
    """Progress for nobody."""


@dataclass(frozen=True)
class TableSetup:
    """What a table is made from.

    Attributes:
        data: folder of the labelled real images.
        work: folder for everything that is kept between runs, and for the results.
        model: model folder; ``None`` for the bundled one.
        seed: seed of everything random.
        proposals: N, or ``None`` for the table's own default.
        steps: denoising steps.
        device: where to compute.
        options: options of this table, by name.
        progress: told what is being done, as a line.
    """

    data: Path
    work: Path
    model: Path | None = None
    seed: int = 0
    proposals: int | None = None
    steps: int = 4
    device: str = "auto"
    options: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[str], None] = _say_nothing

    def engine(self) -> Engine:
        """The model, loaded.

        Raises:
            ModelError: it cannot be used.
        """
        return Engine.load(self.model, self.device)

    def items(self, name: str, every: int = 1) -> list[LabelledSlice]:
        """Every n-th slice of a labelled set.

        Raises:
            DatasetError: it is not in the data folder.
        """
        return load_shared(self.data, name)[::every]

    def store(
        self,
        engine: Engine,
        name: str,
        proposals: int,
        *,
        steps: int | None = None,
        variant: str = "",
        everywhere: bool = False,
    ) -> SampleStore:
        """The store of the engine's samples on a set."""
        chosen = self.steps if steps is None else steps
        key = weights_key(engine)
        return SampleStore(self.work, SampleSettings(name, key, proposals, chosen, self.seed, variant, everywhere))

    def counted(self, what: str, total: int) -> Callable[[int], None]:
        """A progress callback that says how many of ``total`` slices are done."""
        return lambda done: self.progress(f"{what}: slice {done} of {total}")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A numeric option.

        Raises:
            InputError: it is no number, or out of range.
        """
        text = self.options.get(name)
        try:
            value = float(default if text is None else text)  # keys of what is kept hold it: 60 and 60.0 must not differ
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise InputError(f'The option {name} takes a number from {low:g} to {high:g}, not "{text}".')
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole-numbered option; raises as :meth:`number`."""
        value = self.number(name, default, low, high)
        if value != int(value):
            raise InputError(f'The option {name} takes a whole number, not "{self.options[name]}".')
        return int(value)

    def names(self, name: str, default: Sequence[str]) -> list[str]:
        """An option that lists names, separated by commas."""
        text = self.options.get(name)
        return list(default) if text is None else [part.strip() for part in text.split(",") if part.strip()]

    def file(self, name: str) -> Path | None:
        """An option that names a file.

        Raises:
            InputError: there is no such file.
        """
        text = self.options.get(name)
        if text is None:
            return None
        path = Path(text).expanduser()
        if not path.is_file():
            raise InputError(f'The option {name} names a file that does not exist: "{text}".')
        return path


@dataclass(frozen=True)
class TableResult:
    """A measured table.

    Attributes:
        name: name of the table, e.g. ``"n-curve"``.
        title: one line.
        notes: how it was measured: seeds, numbers, definitions.
        header: heads of the columns.
        rows: cells as text; an empty list is a rule between groups.
        facts: the same figures as numbers, for programs; whatever JSON can hold.
        also: further tables that belong to this one, written into the same files.
    """

    name: str
    title: str
    notes: list[str]
    header: list[str]
    rows: list[list[str]]
    facts: dict[str, Any]
    also: tuple[TableResult, ...] = ()

    def markdown(self) -> str:
        """The table with its title and notes in Markdown, and those that belong to it."""
        lines = [f"## {self.title}", "", "| " + " | ".join(self.header) + " |", "|" + " --- |" * len(self.header)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows if row]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([*lines, "", *notes, "", *(part.markdown() for part in self.also)])

    def content(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        own: dict[str, Any] = {"name": self.name, "title": self.title, "notes": self.notes, "header": self.header}
        own |= {"rows": [row for row in self.rows if row], "facts": plain(self.facts)}
        return own | ({"also": [part.content() for part in self.also]} if self.also else {})

    def write(self, work: Path) -> list[Path]:
        """Write ``<name>.json`` and ``<name>.md`` into the work folder; the files.

        Raises:
            OutputError: they cannot be written.
        """
        texts = {
            f"{self.name}.json": json.dumps(self.content(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            f"{self.name}.md": self.markdown(),
        }
        for name, text in texts.items():
            with atomic_file(work / name) as path:
                path.write_text(text, encoding="utf-8")
        return [work / name for name in texts]


def plain(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not know; they become ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def check_work(work: Path) -> None:
    """Make the work folder, before hours of measuring and not after.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"The work folder '{work}' cannot be made ({reason}); choose another folder.") from error

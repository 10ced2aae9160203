"""Many cases, one after the other: results that are kept, an interrupted run that goes on, and one document at the end."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from progidiff import __version__
from progidiff.errors import CancelledError, OutputError, why_left_out
from progidiff.evaluation.cases import EvaluationCase
from progidiff.evaluation.measuring import EvaluationSettings, measure_case
from progidiff.evaluation.metrics import metric_library
from progidiff.evaluation.scoring import ANSWERS, CaseResult, Part
from progidiff.evaluation.summary import TargetSummary, summarise_cases
from progidiff.places import atomic_file
from progidiff.sampling.engine import Engine, weights_key

FORMAT_VERSION = "1.0"


class CaseFailure(Part):
    """A case that could not be measured, and why."""

    set: str
    name: str
    reason: str


class SettingsRecord(Part):
    """Model and settings."""

    model_id: str
    adapter_id: str | None
    weights: str
    device: str
    proposals: int
    steps: int
    seed: int
    k: int
    tolerance_mm: float | None
    distances_by: str
    plane: str | None = None
    correct_values: bool = False


class EvaluationDocument(Part):
    """The whole of ``evaluation.json``. Distances in mm, time in seconds."""

    format: Literal["progidiff-evaluation"] = "progidiff-evaluation"
    format_version: str = FORMAT_VERSION
    program_version: str = __version__
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    settings: SettingsRecord
    summary: list[TargetSummary]
    failures: list[CaseFailure]
    notes: list[str] = Field(default_factory=list)
    cases: list[CaseResult]

    def to_json(self) -> str:
        """JSON text."""
        return self.model_dump_json(indent=1) + "\n"


@dataclass(frozen=True)
class Progress:
    """How far a run is: cases done, of how many, how many of them were kept from before, share of the running one."""

    done: int
    total: int
    kept: int
    share: float


class CaseCache:
    """Results of finished cases, one file each. They hold numbers and names of cases, no pixels.

    Args:
        folder: where they lie.
        key: digest of everything that the figures depend on besides the case.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = Path(folder) / key[:16]

    def get(self, case: EvaluationCase, fingerprint: str) -> CaseResult | None:
        """The result of a case; ``None`` where there is none, it is damaged, or image or labels have changed."""
        try:
            result = CaseResult.model_validate_json(self._path(case).read_bytes())
        except (OSError, ValidationError):
            return None
        return result if result.fingerprint == fingerprint else None

    def put(self, case: EvaluationCase, result: CaseResult) -> None:
        """Keep a result.

        Raises:
            OutputError: the folder cannot be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder {self._folder} cannot be made ({error.strerror}); choose another place with --cache."
            ) from error
        with atomic_file(self._path(case)) as path:
            path.write_text(result.model_dump_json(), encoding="utf-8")

    def _path(self, case: EvaluationCase) -> Path:
        return self._folder / f"{hashlib.sha256(f'{case.set}|{case.name}'.encode()).hexdigest()[:24]}.json"


def evaluate_cases(
    engine: Engine,
    cases: Sequence[EvaluationCase],
    settings: EvaluationSettings,
    cache: Path | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda state: None,
) -> EvaluationDocument:
    """Measure cases and sum them up.

    A case that cannot be read or used is listed with the reason and does not end the run.

    Args:
        engine: loaded engine, its adapter in use.
        cases: the cases; name and set identify them.
        settings: how to measure.
        cache: folder for results of finished cases, taken up by a later run with the same model, adapter and settings.
        cancelled: asked at every denoising step.
        progress: told often.

    Raises:
        CancelledError: ``cancelled()`` turned true; finished cases are kept.
        OutputError: the cache cannot be written to.
    """
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, weights_key(engine), asdict(settings)]).encode()).hexdigest()
    store = None if cache is None else CaseCache(cache, key)
    results: list[CaseResult] = []
    failures: list[CaseFailure] = []
    kept = 0
    for done, case in enumerate(cases):
        if cancelled():
            raise CancelledError("The evaluation was stopped.")

        def report(share: float, done: int = done, kept: int = kept) -> None:
            progress(Progress(done, len(cases), kept, share))

        report(0.0)
        try:
            mark = case.fingerprint()
            result = None if store is None else store.get(case, mark)
            if result is None:
                result = measure_case(engine, case, settings, cancelled, report).model_copy(update={"fingerprint": mark})
                if store is not None:
                    store.put(case, result)
            else:
                kept += 1
        except (CancelledError, OutputError):
            raise
        except Exception as error:  # one case among many; the next one may be sound
            failures.append(CaseFailure(set=case.set, name=case.name, reason=why_left_out(case.name, error)))
            continue
        results.append(result)
    progress(Progress(len(cases), len(cases), kept, 0.0))
    return EvaluationDocument(
        settings=SettingsRecord(
            model_id=engine.card.model_id,
            adapter_id=engine.adapter.adapter_id if engine.adapter else None,
            weights=weights_key(engine),
            device=engine.device,
            proposals=settings.proposals,
            steps=settings.steps,
            seed=settings.seed,
            k=settings.k,
            tolerance_mm=settings.tolerance_mm,
            distances_by=metric_library(),
            plane=settings.plane,
            correct_values=settings.correct_values,
        ),
        summary=summarise_cases(results),
        failures=failures,
        notes=_notes(results, engine),
        cases=results,
    )


def to_csv(document: EvaluationDocument) -> str:
    """A row per case and target, with every answer's figures; an empty field is a figure that does not exist."""
    head = ["set", "case", "patient", "dimensions", "slices", "target", "present", "size"]
    fields = ("dice", "hd95_mm", "hd95_failures", "nsd", "presence")
    head += [f"{answer}_{field}" for answer in ANSWERS for field in fields]
    head += ["spearman", "diversity", "empty_share"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for case in document.cases:
        for target in case.targets:
            row: list[object] = [case.set, case.name, case.patient, case.dimensions, case.slices, target.target]
            row += [int(target.present), f"{target.size:.4g}"]
            for answer in ANSWERS:
                score = target.answers.get(answer)
                row += ["" if score is None else _cell(getattr(score, field)) for field in fields]
            row += [_cell(target.spearman), _cell(target.diversity), _cell(target.empty_share)]
            writer.writerow(row)
    return text.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _notes(results: Sequence[CaseResult], engine: Engine) -> list[str]:
    """What to know of the figures, the most important first."""
    notes = []
    planes = sorted({c.plane for c in results} - set(engine.card.planes))
    if planes:
        known = " and ".join(engine.card.planes)
        notes.append(f"Some cases are {' and '.join(planes)}; the model was trained on {known} slices.")
    notes += dict.fromkeys(note for case in results for note in case.notes)
    said = Counter(warning for case in results for warning in case.warnings)
    notes += [f"{warning} ({count} of {len(results)} cases)" for warning, count in said.most_common()]
    typical = sorted({c.set for c in results if not c.spacing_exact})
    if typical:
        notes.append(f"The pixel size of {', '.join(typical)} is a typical value, and so are the distances in mm.")
    if results and not any(target.present for case in results for target in case.targets):
        notes.append("No case shows what was asked for, so there is no Dice: check whether the label maps are empty.")
    return notes

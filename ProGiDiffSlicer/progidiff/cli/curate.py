"""``progidiff curate``: the set of training examples that the module saves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from progidiff.cli.common import EXIT_PROBLEM, JsonOption, ModalityName

app = typer.Typer(name="curate", help="Look after a set of training examples.", no_args_is_help=True)

SetArgument = Annotated[Path, typer.Argument(metavar="SET", help="Folder of the set.")]
CaseArgument = Annotated[str, typer.Argument(metavar="CASE", help='Id of a case, as "curate list" prints it.')]


def register(parent: typer.Typer) -> None:
    """Add the commands."""
    parent.add_typer(app)


@app.command("list")
def list_cases(
    folder: SetArgument,
    removed: Annotated[bool, typer.Option("--removed", help="List the cases that were removed instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the cases, and how many there are of each target."""
    from rich.console import Console
    from rich.table import Table

    from progidiff.curation import CuratedSet, patient_groups

    kept = CuratedSet(folder)
    kept.labels()  # refuses what is no set
    if removed:
        _say({"removed": kept.removed()}, as_json, "\n".join(kept.removed()) or "Nothing was removed.")
        return
    cases = kept.list()
    groups = patient_groups(cases)
    rows = [
        {
            "id": case.id,
            "modality": case.modality,
            "targets": list(case.targets),
            "edited": case.facts.get("edited"),
            "model": case.facts.get("model_id"),
            "adapter": case.facts.get("adapter_id"),
            "patient": groups[case.id],
        }
        for case in cases
    ]
    damaged = kept.damaged()
    if as_json:
        record = {
            "cases": rows,
            "counts": kept.counts(cases),
            "patients": len(set(groups.values())),
            "damaged": _damaged(damaged.items()),
        }
        print(json.dumps(record, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("case", "modality", "targets", "edited", "model"):
        table.add_column(head, overflow="fold")
    for case in cases:
        model = " + ".join(str(part) for part in (case.facts.get("model_id"), case.facts.get("adapter_id")) if part)
        table.add_row(case.id, case.modality, ", ".join(case.targets), "yes" if case.facts.get("edited") else "no", model)
    screen = Console()
    screen.print(table)
    counts = ", ".join(f"{target} {count}" for target, count in kept.counts(cases).items()) or "none"
    screen.print(f"{len(rows)} cases of {len(set(groups.values()))} patients: {counts}.", highlight=False, soft_wrap=True)
    if damaged:
        screen.print(
            f'{len(damaged)} more are damaged; "progidiff curate verify" says why.', highlight=False, soft_wrap=True
        )


@app.command()
def verify(
    folder: SetArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Finish what was interrupted, put leftovers aside, and write the index again.")
    ] = False,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Younger files may be in somebody's hands and are left alone.")
    ] = 3600.0,
    as_json: JsonOption = False,
) -> None:
    """Check every case in full: checksums, geometry, labels; and look for leftovers. Exit code 1 where cases are damaged."""
    from dataclasses import asdict

    from progidiff.curation import CuratedSet

    kept = CuratedSet(folder)
    problems = kept.verify(repair, older_than)
    count = len(kept.list())
    lines = [f"{p.case}: {p.message}{' (repaired)' if p.repaired else ''}" for p in problems]
    summary = f"{count} cases; {len(problems)} problems." if problems else f"{count} cases; all is well."
    _say({"cases": count, "problems": [asdict(p) for p in problems]}, as_json, "\n".join([*lines, summary]))
    if any(not p.harmless and not p.repaired for p in problems):
        raise typer.Exit(EXIT_PROBLEM)


@app.command()
def export(
    folder: SetArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder, such as nnUNet_raw/Dataset123_Liver.")],
    modality: Annotated[ModalityName, typer.Option(help="Of the cases.")] = ModalityName.CT,
    target: Annotated[
        list[str] | None, typer.Option(help="Target to export; may be given several times (default: the most frequent one).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a clean nnU-Net data set of the cases in which all of the targets are known.

    Exit code 1 where some of them are damaged and were left out.
    """
    from progidiff.curation import CuratedSet

    done = CuratedSet(folder).export(out, modality.value, target)
    sentence = (
        f"{done.cases} cases of {done.patients} patients with {', '.join(done.targets)} in {done.folder};"
        f" {done.left_out} left out, because not all of it is known in them."
    )
    record = {"cases": done.cases, "patients": done.patients, "targets": list(done.targets), "left_out": done.left_out}
    _say({**record, "damaged": _damaged(done.damaged)}, as_json, "\n".join([*_lines(done.damaged), sentence]))
    if done.damaged:
        raise typer.Exit(EXIT_PROBLEM)


@app.command()
def merge(
    folder: SetArgument,
    other: Annotated[list[Path], typer.Argument(metavar="OTHER...", help="Sets whose cases are added.")],
    as_json: JsonOption = False,
) -> None:
    """Add the cases of other sets; nothing that is here is changed. Exit code 1 where some are in conflict or damaged."""
    from dataclasses import asdict

    from progidiff.curation import CuratedSet

    kept = CuratedSet(folder)
    results = [kept.merge(CuratedSet(each)) for each in other]
    totals = {name: sum(len(asdict(r)[name]) for r in results) for name in ("added", "present", "removed", "conflicts")}
    sentence = (
        f"{totals['added']} cases added, {totals['present']} were there already, {totals['removed']} had been removed here,"
        f" {totals['conflicts']} have the id of another case here and were left out."
    )
    damaged = [case for result in results for case in result.damaged]
    record = [{**asdict(r), "damaged": _damaged(r.damaged)} for r in results]
    _say({"results": record}, as_json, "\n".join([*_lines(damaged), sentence]))
    if totals["conflicts"] or damaged:
        raise typer.Exit(EXIT_PROBLEM)


@app.command()
def remove(folder: SetArgument, case: CaseArgument, as_json: JsonOption = False) -> None:
    """Take a case out of the set; "curate restore" brings it back."""
    from progidiff.curation import CuratedSet

    CuratedSet(folder).remove(case)
    _say({"removed": case}, as_json, f'Removed. "progidiff curate restore {folder} {case}" brings it back.')


@app.command()
def restore(folder: SetArgument, case: CaseArgument, as_json: JsonOption = False) -> None:
    """Bring a removed case back."""
    from progidiff.curation import CuratedSet

    CuratedSet(folder).restore(case)
    _say({"restored": case}, as_json, "Restored.")


@app.command()
def rebuild(folder: SetArgument, as_json: JsonOption = False) -> None:
    """Write the index that nnU-Net reads (dataset.json) again from the cases."""
    from progidiff.curation import CuratedSet

    count = CuratedSet(folder).rebuild_index()
    _say({"cases": count}, as_json, f"The index lists {count} cases.")


def _damaged(cases: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"case": case, "reason": reason} for case, reason in cases]


def _lines(damaged: Iterable[tuple[str, str]]) -> list[str]:
    return [f"Left out: {case}: {reason}" for case, reason in damaged]


def _say(record: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(record, indent=2, ensure_ascii=False) if as_json else text)

"""From a folder to a ranking: its volumes are found, and every one is measured once, whatever interrupts it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from progidiff.active.disagreement import measure
from progidiff.active.record import Basis, Item, NextDocument, Unmeasured, read_or_begin
from progidiff.cards import load_card
from progidiff.errors import CancelledError, InputError, why_left_out
from progidiff.places import claimed
from progidiff.sampling.engine import Engine, weights_key
from progidiff.targets import parse_prompt
from progidiff.volumes.dicom import is_dicom_file
from progidiff.volumes.formats import ITK_SUFFIXES, NIFTI_SUFFIXES
from progidiff.volumes.reading import read_volume, series_uid
from progidiff.wire.messages import NextDone, NextItem, NextRequest, NextSettings, NextStart, NextVolume

#: Label maps by their names: nnU-Net's folders, Slicer's segmentations.
_LABEL_FOLDERS = frozenset({"labelstr", "labelsts"})
_LABEL_SUFFIXES = (".seg.nrrd", ".seg.nhdr", ".seg.nii.gz", ".seg.nii")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """A file, or a folder with DICOM images, that should hold a volume.

    Attributes:
        path: where it is.
        name: its path relative to the searched folder, with forward slashes.
    """

    path: Path
    name: str


def find_volumes(folder: Path) -> list[Candidate]:
    """Files in a format of :mod:`progidiff.volumes.reading`, and folders that hold DICOM images, by name.

    A series that is spread over several folders is one volume, of the folder that holds them. Hidden entries,
    nnU-Net's label folders and segmentation files are passed over. Links to folders are not followed.

    Raises:
        InputError: there is no such folder, or no volume in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give the folder that holds the volumes.")
    found: list[Candidate] = []
    series: dict[str, list[Path]] = {}
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n.lower() not in _LABEL_FOLDERS)
        here = Path(directory)
        others = []
        for name in sorted(n for n in names if not n.startswith(".")):
            lower = name.lower()
            if lower.endswith(_LABEL_SUFFIXES):
                continue
            if lower.endswith((*NIFTI_SUFFIXES, *ITK_SUFFIXES)):
                found.append(_candidate(here / name, folder))
            else:
                others.append(here / name)
        if any(_is_dicom(path) for path in others):
            series.setdefault(series_uid(here) or str(here), []).append(here)
    places = {Path(os.path.commonpath(parts)) for parts in series.values()}
    found += [_candidate(place, folder) for place in places]
    if not found:
        raise InputError(f"The folder {folder} holds no volumes (NIfTI, NRRD, MetaImage or DICOM); give another one.")
    return sorted(found, key=lambda c: c.name)


def fingerprint(path: Path) -> str:
    """BLAKE2 digest of a file's content, or of the names and contents of the DICOM files in a folder and below it.

    Raises:
        InputError: something in it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if path.is_dir():
            for entry in sorted(p for p in path.rglob("*") if not p.name.startswith(".") and _is_dicom(p)):
                name = entry.relative_to(path).as_posix()
                digest.update(f"{name}\0{entry.stat().st_size}\0".encode(errors="surrogateescape"))
                _feed(digest, entry)
        else:
            _feed(digest, path)
            raw = _raw_part(path)
            if raw is not None:
                _feed(digest, raw)
    except OSError as error:
        raise InputError(f"{path} cannot be opened; check its permissions.") from error
    return digest.hexdigest()


def _candidate(path: Path, folder: Path) -> Candidate:
    # a name that is not UTF-8 could not be written into the result
    name = path.relative_to(folder).as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")
    return Candidate(path, name)


def _is_dicom(path: Path) -> bool:
    try:
        return path.is_file() and is_dicom_file(path)
    except OSError:
        return False  # a locked file beside the images; whether the series is whole is for the reader to say


def _raw_part(path: Path) -> Path | None:
    """The file beside a ``.mhd`` or ``.nhdr`` header that holds its voxels."""
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return None
    beside = [path.with_suffix(ending) for ending in (".raw", ".zraw", ".raw.gz")]
    return next((p for p in beside if p.is_file()), None)


def _feed(digest: hashlib.blake2b, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)


#: Told what happens.
Tell = Callable[[NextStart | NextVolume | NextDone], None]


def search(request: NextRequest, tell: Tell, cancelled: Callable[[], bool]) -> NextDocument:
    """Load the model, and the adapter, and rank the folder; see :func:`rank_folder`.

    Raises:
        AdapterError, InputError, ModelError, OutputError, PromptError: something of the request cannot be used.
    """
    model, out = None if request.model is None else Path(request.model), Path(request.out)
    targets = [target.key for target in parse_prompt(request.prompt, load_card(model).vocabulary)]
    with claimed(out):
        engine: Engine = Engine.load(model, request.device)
        if request.adapter is not None:
            engine.load_adapter(Path(request.adapter), request.even_if_worse)
        return rank_folder(engine, Path(request.folder), targets, out, request.settings, tell, cancelled)


def rank_folder(
    engine: Engine,
    folder: Path,
    targets: Sequence[str],
    out: Path,
    settings: NextSettings,
    tell: Tell = lambda message: None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda share: None,
) -> NextDocument:
    """Measure the volumes of a folder and rank them by how much their proposals disagree.

    The file ``out`` is written after every volume. Volumes whose content it knows are not measured again, also where they
    were moved or renamed; those that are gone are left out.

    Args:
        engine: loaded engine, its adapter in use.
        folder: folder with volumes, also in folders below it.
        targets: targets of the model's vocabulary.
        out: the result file.
        settings: how much to sample.
        tell: told the start, each new volume, and the end.
        cancelled: asked at every denoising step; what was measured is kept.
        progress: told the share of the running volume that is done.

    Returns:
        The document as written; ``complete`` is false where it was cancelled.

    Raises:
        InputError: no such folder, or no volume in it.
        OutputError: the result file is something else, or cannot be written.
    """
    if settings.proposals < 2:
        raise InputError("Disagreement needs at least 2 proposals for each target.")
    found = find_volumes(folder)
    document, sentence = read_or_begin(out, _identity(engine, targets, settings))
    # a write now: a place that cannot be written to is better known before the first volume than after it
    known, waiting, failures = _sort(found, document.volumes)
    document.volumes, document.failures, document.complete = known, failures, False
    document.write(out)
    tell(NextStart(len(found), len(known), sentence))
    done, spent = len(known) + len(failures), []
    for failure in failures:
        tell(NextVolume(done, len(found), None, _told(failure)))
    for candidate, mark in waiting:
        began = time.monotonic()
        try:
            result = _measured(engine, candidate, mark, targets, settings, cancelled, progress)
        except CancelledError:
            break
        if isinstance(result, Item):
            document.volumes.append(result)
            spent.append(time.monotonic() - began)
        else:
            document.failures.append(result)
        done += 1
        document.write(out)
        eta = sum(spent) / len(spent) * (len(found) - done) if spent else None
        tell(NextVolume(done, len(found), eta, _told(result)))
    else:
        document.complete = True
        document.write(out)
    ranking, failed = tuple(map(_told, document.ranked())), tuple(map(_told, document.failures))
    tell(NextDone(ranking, failed, cancelled=not document.complete))
    return document


def _identity(engine: Engine, targets: Sequence[str], settings: NextSettings) -> Basis:
    return Basis(
        model_id=engine.card.model_id,
        weights=weights_key(engine),
        adapter_id=engine.adapter.adapter_id if engine.adapter else None,
        targets=list(targets),
        proposals=settings.proposals,
        steps=settings.steps,
        slices=settings.slices,
        closer=settings.closer,
        seed=settings.seed,
        modality=settings.modality,
        plane=settings.plane or "automatic",
        correct_values=settings.correct_values,
    )


def _sort(
    found: Sequence[Candidate], before: Sequence[Item]
) -> tuple[list[Item], list[tuple[Candidate, str]], list[Unmeasured]]:
    """What is known by its content, what is to be measured (with its fingerprint), and what cannot be opened."""
    by_content = {item.fingerprint: item for item in before}
    known: list[Item] = []
    waiting: list[tuple[Candidate, str]] = []
    failures: list[Unmeasured] = []
    for candidate in found:
        try:
            mark = fingerprint(candidate.path)
        except Exception as error:
            failures.append(Unmeasured(path=candidate.name, reason=why_left_out(candidate.name, error)))
            continue
        item = by_content.get(mark)
        if item is None:
            waiting.append((candidate, mark))
        else:
            known.append(item.model_copy(update={"path": candidate.name}))
    return known, waiting, failures


def _measured(
    engine: Engine,
    candidate: Candidate,
    mark: str,
    targets: Sequence[str],
    settings: NextSettings,
    cancelled: Callable[[], bool],
    progress: Callable[[float], None],
) -> Item | Unmeasured:
    began = time.monotonic()
    try:
        volume = read_volume(candidate.path)
        item = measure(engine, volume, targets, settings, cancelled, progress)
    except CancelledError:
        raise
    except Exception as error:  # one volume among many; the next one may be sound
        return Unmeasured(path=candidate.name, reason=why_left_out(candidate.name, error))
    return item.model_copy(update={"path": candidate.name, "fingerprint": mark, "seconds": time.monotonic() - began})


def _told(result: Item | Unmeasured) -> NextItem:
    left = {"fingerprint", "seconds"} if isinstance(result, Item) else set()
    return NextItem(**result.model_dump(exclude=left))

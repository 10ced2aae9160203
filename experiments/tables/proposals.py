"""The one set of proposals that the tables n-curve, raters, ranking and ablations share: 50 of each target on each slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.samples import Samples, SampleStore, propose_into
from experiments.tables.setup import TableSetup
from progidiff.datasets.slices import LabelledSlice, present_targets
from progidiff.errors import InputError
from progidiff.sampling.engine import Engine

#: Proposals per pair of slice and target, as many as the paper shows.
MAIN = 50
#: Numbers of proposals at which everything is measured; the mean probability of the first n is kept for each.
NUMBERS = (1, 2, 5, 10, 20, 50)
SETS = ("curvas", "amos")

SETS_OPTION = {"sets": f"sets to measure, separated by commas; by default {','.join(SETS)}"}


def main_proposals(setup: TableSetup) -> int:
    """N of the shared proposals."""
    return MAIN if setup.proposals is None else setup.proposals


def thinned(every: int) -> str:
    """Which slices were measured, for a note."""
    return (
        "all slices" if every == 1 else f"every {every}th slice" if every > 3 else f"every {('2nd', '3rd')[every - 2]} slice"
    )


def kept_numbers(count: int) -> list[int]:
    """Numbers of proposals to measure at, up to ``count`` and with it."""
    return sorted({n for n in NUMBERS if n <= count} | {count})


def shared_store(setup: TableSetup, engine: Engine, name: str, items: Sequence[LabelledSlice]) -> SampleStore:
    """The shared proposals of a set; what is missing is sampled."""
    count = main_proposals(setup)
    store = setup.store(engine, name, count)
    vocabulary = engine.card.vocabulary
    propose_into(
        store,
        engine,
        items,
        lambda item: present_targets(item, vocabulary),
        kept_numbers(count)[:-1],
        progress=setup.counted(f"{name}, {count} proposals", len(items)),
    )
    return store


def pairs(
    store: SampleStore, items: Sequence[LabelledSlice], vocabulary: Sequence[str]
) -> Iterator[tuple[LabelledSlice, str, Samples]]:
    """Every present target of every slice with its samples.

    Raises:
        InputError: samples are missing.
    """
    for item in items:
        for target in present_targets(item, vocabulary):
            samples = store.get(item.slice_id, target)
            if samples is None:
                raise InputError("Samples in the work folder are damaged; run the table again, or with another --work.")
            yield item, target, samples

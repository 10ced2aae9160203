"""Which pieces of a proposal stay and which holes are filled, by the form of the target and by the other proposals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from progidiff.errors import ProtocolError
from progidiff.proposals.pieces import Tidied, tidy
from progidiff.proposals.proposals import CONSENSUS, MEAN, Proposals
from progidiff.proposals.votes import agreement, gram_matrix
from progidiff.targets import catalog, target_for
from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import ProposeRequest, TidiedEvent

from ..proposal_examples import slice_event
from ..volume_examples import GEOMETRIES, oblique

SHAPE = (12, 40, 60)
COUNT = 10
Cuboid = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
#: The organ, and a piece of a third of its size that is 60 mm away from it; neither reaches an end of the stack.
ORGAN: Cuboid = ((3, 9), (5, 17), (5, 17))
FAR: Cuboid = ((4, 8), (20, 29), (37, 45))


def painted(*cuboids: Cuboid) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for cuboid in cuboids:
        mask[tuple(slice(*side) for side in cuboid)] = True
    return mask


def votes(*entries: tuple[int, Cuboid]) -> np.ndarray:
    """uint8: how many proposals contain each cuboid."""
    counts = np.zeros(SHAPE, np.uint8)
    for count, cuboid in entries:
        counts[painted(cuboid)] = count
    return counts


def tidied(mask: np.ndarray, counts: np.ndarray, target: str, ends: bool = True) -> tuple[np.ndarray, Tidied]:
    spacing = (3.0, 3.0, 3.0)
    before = mask.copy()
    result = tidy(mask, counts, COUNT, target_for(target), spacing, np.full((3, 2), ends))
    np.testing.assert_array_equal(mask, before)
    return result


def check(found: tuple[np.ndarray, Tidied], cuboids: Iterable[Cuboid], pieces: int) -> None:
    mask, change = found
    np.testing.assert_array_equal(mask, painted(*cuboids))
    assert change.pieces == pieces


def test_a_second_organ_far_away_and_islands_are_dropped() -> None:
    island: Cuboid = ((5, 6), (30, 32), (5, 7))
    mask, counts = painted(ORGAN, FAR, island), votes((9, ORGAN), (9, FAR), (2, island))
    found, change = tidied(mask, counts, "liver")
    np.testing.assert_array_equal(found, painted(ORGAN))
    assert change == Tidied(2, int(painted(FAR, island).sum()), 0)


def test_the_piece_that_the_others_share_is_the_organ_whatever_its_size() -> None:
    found = tidied(painted(ORGAN, FAR), votes((1, ORGAN), (9, FAR)), "gallbladder")
    check(found, [FAR], 1)


def test_two_pieces_of_like_votes_are_left_alone() -> None:
    """Nobody can say which of them is the organ."""
    check(tidied(painted(ORGAN, FAR), votes((4, ORGAN), (8, FAR)), "pancreas"), [ORGAN, FAR], 0)


def test_a_pair_has_two_pieces() -> None:
    small: Cuboid = ((5, 7), (30, 34), (5, 9))
    mask, counts = painted(ORGAN, FAR, small), votes((9, ORGAN), (9, FAR), (9, small))
    check(tidied(mask, counts, "kidneys"), [ORGAN, FAR], 1)
    check(tidied(mask, counts, "left kidney"), [ORGAN], 2)
    # a speck is no second kidney
    check(tidied(painted(ORGAN, small), counts, "kidneys"), [ORGAN], 1)


def test_of_a_tube_only_small_islands_far_away_are_dropped() -> None:
    near: Cuboid = ((3, 5), (5, 8), (20, 22))
    speck: Cuboid = ((5, 6), (30, 32), (50, 52))
    cuboids, counts = [ORGAN, FAR, near], votes((9, ORGAN), (9, FAR), (9, near), (9, speck))
    for target in ("aorta", "colon"):
        check(tidied(painted(*cuboids, speck), counts, target), cuboids, 1)


def test_where_the_others_bridge_a_gap_both_sides_stay() -> None:
    gap: Cuboid = ((3, 9), (5, 17), (17, 20))
    beyond: Cuboid = ((3, 9), (5, 17), (20, 23))
    mask = painted(ORGAN, beyond)
    check(tidied(mask, votes((9, ORGAN), (6, gap), (9, beyond)), "liver"), [ORGAN, beyond], 0)
    check(tidied(mask, votes((9, ORGAN), (5, gap), (9, beyond)), "liver"), [ORGAN], 1)


def test_what_reaches_the_same_end_of_the_stack_may_be_joined_beyond() -> None:
    organ: Cuboid = ((0, 9), (5, 17), (5, 17))
    horn: Cuboid = ((0, 3), (5, 17), (30, 36))
    mask = painted(organ, horn)
    check(tidied(mask, votes((9, organ), (9, horn)), "stomach"), [organ, horn], 0)
    # unless most of the proposals do not see it, or the part of the stack goes on
    check(tidied(mask, votes((9, organ), (4, horn)), "stomach"), [organ], 1)
    check(tidied(mask, votes((9, organ), (9, horn)), "stomach", ends=False), [organ], 1)
    other: Cuboid = ((9, 12), (5, 17), (30, 36))
    check(tidied(painted(organ, other), votes((9, organ), (9, other)), "stomach"), [organ], 1)


def test_small_holes_are_filled_and_large_ones_where_the_others_fill_them() -> None:
    mask = painted(ORGAN)
    mask[5, 8, 8] = False
    mask[6, 9:13, 9:13] = False  # closed in 3-D
    mask[3:5, 7:10, 12:15] = False  # closed on its slices only
    for target, count, left in (("liver", 9, 0), ("liver", 3, 34), ("duodenum", 9, 34), ("duodenum", 3, 34)):
        found, change = tidied(mask, votes((count, ORGAN)), target)
        assert int((painted(ORGAN) & ~found).sum()) == left
        assert change == Tidied(0, 0, int(found.sum() - mask.sum()))
        assert found[5, 8, 8]


def test_a_target_of_which_nothing_is_known_is_left_alone() -> None:
    mask = painted(ORGAN, FAR)
    mask[5, 8, 8] = False
    for target in ("spine", "ribs", "tumor of the left kidney"):
        found, change = tidied(mask, votes((9, ORGAN)), target)
        np.testing.assert_array_equal(found, mask)
        assert change == Tidied()
    assert tidied(np.zeros(SHAPE, bool), votes(), "liver")[1] == Tidied()


def test_every_target_has_a_form() -> None:
    forms = {key: target.form for key, target in catalog().items()}
    assert set(forms.values()) == {"solid", "tube", "any"}
    assert {key for key, target in catalog().items() if target.side == "both"} >= {"kidneys", "lungs", "adrenal glands"}
    assert [forms[key] for key in ("kidneys", "portal vein", "small bowel", "ribs")] == ["solid", "tube", "tube", "any"]


@pytest.mark.parametrize("name", ["LPS", "PSR"])
def test_tidied_slices_make_the_same_proposals_elsewhere(name: str) -> None:
    geometry = GEOMETRIES[name]
    plan = plan_slices(geometry)
    shape = plan.shape_kji
    masks = np.zeros((4, *shape), bool)
    masks[:, 0:2, 0:2, 0:2] = True
    masks[1, -1, -1, -1] = True
    first, second = (Proposals("liver", plan, range(plan.count)) for _ in range(2))
    for index in first.slices:
        for proposals in (first, second):
            proposals.add(slice_event(masks, plan, index))
    before = first.rank(ProposeRequest(("liver",)), 0.5, "")
    assert before.dropped_pieces == []
    assert before.millilitres[1] == before.millilitres[0] + 0.5
    events = list(first.tidy())
    for event in events:
        second.add(event)
    clean = masks.copy()
    clean[1, -1, -1, -1] = False
    for proposals in (first, second):
        np.testing.assert_array_equal(proposals.gram, gram_matrix(clean))
        np.testing.assert_array_equal(proposals.agreement(), agreement(clean))
        for number, mask in enumerate(clean):
            np.testing.assert_array_equal(proposals.volume(number), mask)
        for ensemble in (CONSENSUS, MEAN):
            np.testing.assert_array_equal(proposals.volume(ensemble), clean[0])
    after = first.rank(ProposeRequest(("liver",)), 0.5, "")
    assert after.dropped_pieces == [0, 1, 0, 0]
    assert after.dropped_ml == [0.0, 0.5, 0.0, 0.0]
    assert after.groups == [[0, 1, 2, 3]]
    second.add(after)
    assert second.checked() is after
    # only slices that changed are told of
    assert len(events) == 1


def test_tidied_slices_that_do_not_fit_are_refused() -> None:
    geometry = oblique()
    plan = plan_slices(geometry)
    proposals = Proposals("liver", plan, range(plan.count))
    masks = np.ones((2, *plan.shape_kji), bool)
    rows, columns = plan.shape_rc
    whole = np.zeros((3, rows, columns), bool)
    with pytest.raises(ProtocolError, match="left out"):
        proposals.add(TidiedEvent("liver", 0, (0, 0), whole))
    proposals.add(slice_event(masks, plan, 0, last=False))
    with pytest.raises(ProtocolError, match="left out"):
        proposals.add(TidiedEvent("liver", 0, (0, 0), whole))
    proposals.add(slice_event(masks, plan, 0))
    for wrong in (TidiedEvent("liver", 0, (1, 0), whole), TidiedEvent("liver", 0, (0, 0), whole[1:])):
        with pytest.raises(ProtocolError, match="left out"):
            proposals.add(wrong)
    assert proposals.voxels.tolist() == [rows * columns] * 2
    proposals.add(TidiedEvent("liver", 0, (0, 0), whole))
    assert proposals.voxels.tolist() == [0, 0]


def test_the_work_ends_where_the_check_says_so() -> None:
    plan = plan_slices(GEOMETRIES["LPS"])
    proposals = Proposals("liver", plan, range(plan.count))
    for index in proposals.slices:
        proposals.add(slice_event(np.ones((3, *plan.shape_kji), bool), plan, index))

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(proposals.tidy(check))
    assert not proposals.ranked

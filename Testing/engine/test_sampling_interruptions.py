"""Cancelling at any moment, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import CancelledError, ModelError
from progidiff.wire.messages import ProposeRequest, RankingEvent, SliceEvent

Run = Callable[..., Any]
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("part", ["text_encoder", "image_encoder", "controlnet", "unet", "decoder"])
def test_cancel_takes_effect_within_one_step(
    engine: Any, run_engine: Run, make_phantom: Run, part: str, adaptive: bool
) -> None:
    """Asked for while a network runs, whichever: no further step begins, nothing is sent, and the engine goes on working."""
    model = engine.model
    before = run_engine(engine, slices=(0, 1)).masks("liver")[0]
    volume, affine = make_phantom()
    engine.set_image(volume[::-1], affine, "CT")  # so that nothing of it is known yet
    network = model.vae.decoder if part == "decoder" else getattr(model, part)
    wanted, steps_after = False, 0

    def ask(*_: Any) -> None:
        nonlocal wanted
        wanted = True

    def count(*_: Any) -> None:
        nonlocal steps_after
        steps_after += wanted

    hooks = [model.controlnet.register_forward_pre_hook(count), network.register_forward_pre_hook(ask)]
    events: list[Any] = []
    request = ProposeRequest(("spleen",), proposals=4, steps=4, batch_size=2, adaptive=adaptive)
    with pytest.raises(CancelledError):
        engine.propose(request, events.append, lambda: wanted)
    for hook in hooks:
        hook.remove()
    assert steps_after <= (1 if part in ("controlnet", "unet") else 0)
    assert not any(isinstance(event, SliceEvent) for event in events)
    engine.set_image(volume, affine, "CT")
    assert np.array_equal(run_engine(engine, slices=(0, 1)).masks("liver")[0], before)


def test_cancel_while_slices_are_sent_stops_the_next_one(engine: Any) -> None:
    events: list[Any] = []
    request = ProposeRequest(("liver",), proposals=2, steps=1, batch_size=8)  # all slices in one batch
    with pytest.raises(CancelledError):
        engine.propose(request, events.append, lambda: any(isinstance(event, SliceEvent) for event in events))
    assert sum(isinstance(event, SliceEvent) for event in events) == 1


def test_cancel_after_the_last_slice_gives_no_ranking(engine: Any) -> None:
    events: list[Any] = []

    def cancelled() -> bool:
        return sum(isinstance(event, SliceEvent) for event in events) == 4

    with pytest.raises(CancelledError):
        engine.propose(ProposeRequest(("liver",), proposals=2, steps=1), events.append, cancelled)
    assert not any(isinstance(event, RankingEvent) for event in events)


def test_cancelled_before_it_began(engine: Any) -> None:
    events: list[Any] = []
    with pytest.raises(CancelledError):
        engine.propose(ProposeRequest(("liver",)), events.append, lambda: True)
    assert events == []


def _limit(module: torch.nn.Module, rows: int, error: Exception) -> list[int]:
    """Let a network run out of memory for more than ``rows`` rows; notes the batches that it was given."""
    seen: list[int] = []

    def check(_: Any, args: tuple[Any, ...]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > rows:
            raise error

    module.register_forward_pre_hook(check)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MESSAGE), MemoryError()],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("part", ["unet", "decoder"])
def test_out_of_memory_halves_the_batch_and_changes_no_mask(
    engine: Any, run_engine: Run, part: str, error: Exception
) -> None:
    expected = run_engine(engine, "liver", "spleen", proposals=5, batch_size=16)
    seen = _limit(engine.model.unet if part == "unet" else engine.model.vae.decoder, 5, error)
    result = run_engine(engine, "liver", "spleen", proposals=5, batch_size=16)
    assert seen[0] == 16
    assert max(seen[-4:]) <= 4
    assert [w.code for w in result.warnings] == ["memory", "memory"]
    assert ["8 samples" in result.warnings[0].message, "4 samples" in result.warnings[1].message] == [True, True]
    for target in ("liver", "spleen"):
        found, wanted = result.masks(target), expected.masks(target)
        assert all(np.array_equal(found[index], wanted[index]) for index in wanted)
    fractions = [event.fraction for event in result.progress]
    assert fractions[-1] == 1
    assert max(fractions) <= 1
    assert result.rankings["liver"].order == expected.rankings["liver"].order


def test_out_of_memory_is_counted_from_the_rows_there_are(engine: Any, run_engine: Run) -> None:
    """Four rows under a limit of 64 go on with two, not through four rounds of halving a number that was never reached."""
    seen = _limit(engine.model.unet, 2, torch.OutOfMemoryError())
    result = run_engine(engine, proposals=4, batch_size=64, slices=(0, 1), steps=1)
    assert seen == [4, 2, 2]
    assert len(result.warnings) == 1


def test_out_of_memory_lets_go_of_what_it_held(engine: Any, run_engine: Run) -> None:
    """The tensors of the failed batch must be gone when the smaller one begins, or the memory would still be missing."""
    import gc
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    gc.disable()  # only reference counts may free them

    def check(_: Any, args: tuple[Any, ...]) -> None:
        if not held:
            held.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError
        alive.append(held[0]() is not None)

    engine.model.unet.register_forward_pre_hook(check)
    try:
        run_engine(engine, batch_size=4, slices=(0, 1))
    finally:
        gc.enable()
    assert alive
    assert not any(alive)


def test_too_little_memory_for_one_sample_is_said(engine: Any, run_engine: Run) -> None:
    _limit(engine.model.unet, 0, torch.OutOfMemoryError())
    with pytest.raises(ModelError, match=r"not enough memory .*\.$"):
        run_engine(engine, batch_size=4, slices=(0, 1))


def test_other_errors_are_not_taken_for_memory(engine: Any, run_engine: Run) -> None:
    seen = _limit(engine.model.unet, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run_engine(engine, batch_size=4, slices=(0, 1))
    assert len(seen) == 1

"""Which adapter a run makes the worker hold, and what becomes of the run where it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from progidiff.wire.conversation import WorkerFailure
from ProGiDiffSlicerLib.session import SessionState

from .session_support import FakeClient
from .watched_session import Watched, client, request, send, session, volume

__all__ = ["client", "session", "volume"]


def run(session: Watched, client: FakeClient, volume: Any, **settings: Any) -> None:
    """A run to its end."""
    session.start(request(volume, "liver", **settings))
    client.reach_propose()
    send(client)
    client.finish()


def test_a_run_loads_swaps_and_unloads_what_it_asks_for(session: Watched, client: FakeClient, volume: Any) -> None:
    run(session, client, volume)
    assert client.kinds == ["load", "set_image", "propose"]
    client.calls.clear()
    run(session, client, volume, adapter_folder="/a/one")
    assert client.kinds == ["load_adapter", "set_image", "propose"]
    assert client.calls[0][1] == ("/a/one", False)
    assert session.store is not None
    assert session.store.adapter_id == "id of /a/one"
    client.calls.clear()
    run(session, client, volume, adapter_folder="/a/two", adapter_even_if_worse=True)
    assert client.calls[0][1] == ("/a/two", True)
    client.calls.clear()
    run(session, client, volume, adapter_folder="")
    assert client.kinds == ["unload_adapter", "set_image", "propose"]
    assert session.store.adapter_id == ""


def test_a_refused_adapter_ends_the_run_and_loses_nothing(session: Watched, client: FakeClient, volume: Any) -> None:
    run(session, client, volume)
    store = session.store
    session.start(request(volume, "liver", adapter_folder="/a/one"))
    client.call.fail(WorkerFailure("remote", "The adapter was made for another model.", code="adapter"))
    assert session.state is SessionState.IDLE
    assert session.heard("failed")[-1] == ("The adapter was made for another model.",)
    assert session.failure.code == "adapter"
    assert session.store is store


@pytest.mark.parametrize("end", ["crash", "cancel"])
def test_an_end_while_the_adapter_loads(end: str, session: Watched, client: FakeClient, volume: Any) -> None:
    session.start(request(volume, "liver", adapter_folder="/a/one"))
    client.answer_load()
    assert client.call.kind == "load_adapter"
    if end == "crash":
        client.crash()
        assert session.heard("failed")
    else:
        session.cancel()
        client.confirm_cancel()
        assert session.heard("cancelled")
    assert session.state is SessionState.IDLE
    client.calls.clear()
    run(session, client, volume, adapter_folder="/a/one")
    assert "load_adapter" in client.kinds

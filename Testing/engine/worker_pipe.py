"""A bare peer of the worker for tests: raw bytes in, frames out, every wait bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import psutil

from progidiff.wire.codec import frame_to_reply, to_frame, to_line
from progidiff.wire.frames import PREFIX, FrameDecoder, encode_frame
from progidiff.wire.messages import FINAL, Heartbeat, Load, Reply, Request, SetImage

SCRIPT = Path(__file__).with_name("scripted_worker.py")
ENGINE = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer"
PATIENCE_S = 60.0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"}


def scripted_command(*options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *options]


def raw_frame(header: bytes, payload: bytes = b"", *, magic: bytes = b"PGD1", claimed: int | None = None) -> bytes:
    """A frame with whatever header; ``claimed`` is the payload length that it states."""
    return PREFIX.pack(magic, len(header), len(payload) if claimed is None else claimed) + header + payload


def request_bytes(request: Request, request_id: int) -> bytes:
    frame = to_frame(request, request_id)
    return b"".join(encode_frame(frame.header, frame.arrays))


def phantom(shape: tuple[int, int, int] = (3, 16, 20)) -> np.ndarray:
    k, j, i = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return ((k + 1) * 100 - (j - shape[1] / 2) ** 2 - (i - shape[2] / 2) ** 2).clip(0).astype(np.int16)


def tell(lines: list[dict[str, Any]]) -> Callable[[Reply], None]:
    """Keeps what is told, after its way over the wire, as the command line prints it."""

    def keep(reply: Reply) -> None:
        frame = to_frame(reply, 1)
        (arrived,) = FrameDecoder().feed(b"".join(map(bytes, encode_frame(frame.header, frame.arrays))))
        lines.append(json.loads(json.dumps(to_line(frame_to_reply(arrived)[1]))))

    return keep


class Peer:
    """A worker process at the other end of two pipes."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            bufsize=0,
            **options,
        )
        self.replies: Queue[tuple[int | None, Reply]] = Queue()
        self.heartbeats = 0
        self._closing = False
        self._reading = threading.Event()
        self._reading.set()
        self.log = b""
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._read, self._read_log)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *details: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def send(self, request: Request, request_id: int = 1) -> None:
        self.send_bytes(request_bytes(request, request_id))

    def send_bytes(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self.process.stdin.write(view) or 0 :]

    def close_input(self) -> None:
        self.process.stdin.close()

    def next(self, timeout: float = PATIENCE_S) -> tuple[int | None, Reply]:
        return self.replies.get(timeout=timeout)

    def reply(self, request_id: int | None, kind: type[Any], timeout: float = PATIENCE_S) -> Any:
        """The next reply to a request that is of a kind; replies of other kinds before it are skipped."""
        deadline = time.monotonic() + timeout
        while True:
            answered, reply = self.next(max(0.01, deadline - time.monotonic()))
            if answered == request_id and isinstance(reply, kind):
                return reply

    def pause_reading(self) -> None:
        """Leave the worker's replies in the pipe, but for what a read in progress still takes."""
        self._reading.clear()

    def resume_reading(self) -> None:
        self._reading.set()

    def stop_reading(self) -> None:
        """Close the other end of the worker's output."""
        self._closing = True
        self._threads[0].join(PATIENCE_S)

    def memory_settles(self) -> float:
        """Resident memory of the worker in MiB, once it grows no further."""
        worker = psutil.Process(self.process.pid)
        seen = -1.0
        while (now := worker.memory_info().rss / 2**20) > seen:
            seen = now
            time.sleep(0.5)
        return now

    def wait(self, timeout: float = PATIENCE_S) -> int:
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        return code

    def prepare(self, mode: str = "work", image: np.ndarray | None = None) -> None:
        """Load a scripted model and set an image."""
        loaded = self.ask(Load(mode, "cpu"), 901)
        assert type(loaded).__name__ == "Loaded", loaded
        assert (
            type(self.ask(SetImage(phantom() if image is None else image, np.eye(4), "CT", None), 902)).__name__
            == "ImageReply"
        )

    def ask(self, request: Request, request_id: int, each: Callable[[Reply], None] | None = None) -> Reply:
        """Send a request; its final reply, and ``each`` sees what came before."""
        self.send(request, request_id)
        return self.final(request_id, each)

    def final(self, request_id: int, each: Callable[[Reply], None] | None = None) -> Reply:
        """The final reply to a request; ``each`` sees what came before."""
        while True:
            answered, reply = self.next()
            if answered == request_id:
                if isinstance(reply, FINAL):
                    return reply
                if each is not None:
                    each(reply)

    def _read(self) -> None:
        decoder = FrameDecoder()
        while data := self.process.stdout.read(1 << 16):
            self._reading.wait()
            if self._closing:
                break
            for frame in decoder.feed(data):
                answered, reply = frame_to_reply(frame)
                if isinstance(reply, Heartbeat):
                    self.heartbeats += 1
                else:
                    self.replies.put((answered, reply))
        self.process.stdout.close()

    def _read_log(self) -> None:
        while data := self.process.stderr.read(1 << 16):
            self.log += data

"""A worker on another computer: ssh that asks nobody anything, and what its end means in one sentence.

Both clients use it, that of the command line and the module's. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath

_SSH_FAILED = 255  # ssh's own failures; any other code is that of the command over there
_NOT_FOUND = (126, 127)  # how a shell says that there is no such program

# In OpenSSH's words, which no language setting changes; the first that is found counts.
_TROUBLES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "The other computer shows another host key than the one that is known of it: it was installed anew, or somebody is "
        "in between; ask who runs it, then remove the old key with ssh-keygen -R and connect once in a terminal.",
    ),
    (
        r"Host key verification failed|host key is known for",
        "The host key of the other computer is not known here; connect to it once in a terminal and accept its key.",
    ),
    (
        r"Permission denied \(|Too many authentication failures",
        "The other computer lets nobody in without a password; set up a key for ssh until ssh -o BatchMode=yes enters it.",
    ),
    (
        r"Could not resolve hostname",
        "There is no computer of the name in the worker command; correct it, or connect to the network that knows it.",
    ),
    (
        r"ssh: connect to host",
        "The other computer cannot be reached; see that it is switched on and takes ssh, and that the network is there.",
    ),
    (
        r"[Cc]onnection (to .* )?(closed|reset|timed out)|Broken pipe|Timeout, server|Read from remote host",
        "The connection to the other computer was lost; see that the network is there, then try again.",
    ),
)


def unattended(command: Sequence[str]) -> list[str]:
    """A worker's command in which ssh fails where it would ask for a password or a host key.

    Nobody would see the question: the worker has no terminal, or one in which nobody looks. A command that says
    something of ``BatchMode`` itself, or that is not ssh, is left as it is.
    """
    words = list(command)
    name = PureWindowsPath(PurePosixPath(words[0]).name).name.lower().removesuffix(".exe")
    if name != "ssh" or any("batchmode" in word.lower() for word in words):
        return words
    return [words[0], "-o", "BatchMode=yes", *words[1:]]


def meaning_of_end(exit_code: int | None, log: str) -> str:
    """What the end of a worker's process means, with the next step; "" where neither code nor log tell.

    Args:
        exit_code: of the process, ``None`` where it is not known.
        log: what it wrote on standard error.
    """
    if exit_code in _NOT_FOUND:
        return (
            "The program that the worker command names was not found where it was looked for; give its whole path, such as "
            "/opt/progidiff/bin/python."
        )
    if exit_code != _SSH_FAILED:
        return ""
    return next((sentence for words, sentence in _TROUBLES if re.search(words, log)), "")

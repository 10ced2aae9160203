"""Why an installation failed, and what to do: one sentence from what pip or the PyTorch extension printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.request import getproxies

from slicer.i18n import tr as _

Kind = Literal["proxy", "certificate", "network", "disk", "in_use", "permission", "conflict", "no_match", "other"]

# In the order in which they are tried: a proxy that refuses is a network that fails, and pip then adds that nothing matches.
_SIGNS: tuple[tuple[Kind, str], ...] = (
    ("disk", r"No space left on device|Errno 28|not enough space on the disk|WinError 112|Disk quota exceeded"),
    ("in_use", r"WinError 5\b|WinError 32\b|being used by another process"),
    ("proxy", r"ProxyError|Cannot connect to proxy|Proxy Authentication Required|Tunnel connection failed"),
    ("certificate", r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|certificate verify failed"),
    (
        "network",
        r"NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out|NameResolutionError|Temporary failure in name"
        r"|getaddrinfo failed|Network is unreachable|Connection refused|ConnectionResetError|Connection to \S+ timed out"
        r"|nodename nor servname|Could not fetch URL|URLError|Failed to establish a new connection|RemoteDisconnected"
        # what the PyTorch extension's installer (light-the-torch) makes of a server of torch that it cannot reach
        r"|build_source\(\) missing \d+ required keyword-only argument",
    ),
    ("permission", r"Permission denied|Errno 13|Read-only file system|Errno 30"),
    ("conflict", r"ResolutionImpossible|conflicting dependencies|Cannot install .* because these package versions"),
    ("no_match", r"No matching distribution found|Could not find a version that satisfies"),
)
_UNIMPORTANT = re.compile(r"^\s*(\[notice\]|WARNING|DEPRECATION|For help visit|To fix this|$)")
_WANTED = re.compile(r"No matching distribution found for (\S+)|satisfies the requirement (\S+)")
_CONFLICT = re.compile(r"because (.*versions have conflicting dependencies)|user requested \(constraint\) (\S+)")


@dataclass(frozen=True)
class Failure:
    """Why it failed.

    Attributes:
        kind: what the sentence was chosen by.
        message: one sentence with the next step.
        details: what was printed, for a support person.
    """

    kind: Kind
    message: str
    details: str = ""


def explain(lines: Sequence[str], offline: bool = False, program: str = "pip") -> Failure:
    """The failure behind what was printed.

    Args:
        lines: what pip (or what called it) printed, in order.
        offline: whether it was to use a wheel folder alone.
        program: what failed, as the user knows it.
    """
    text = "\n".join(lines)
    kind: Kind = next((kind for kind, sign in _SIGNS if re.search(sign, text, re.IGNORECASE)), "other")
    if kind == "network" and getproxies():
        kind = "proxy"  # with a proxy set, it is the proxy that pip could not reach or that could not reach the server
    return Failure(kind, _sentence(kind, lines, offline, program), text)


def last_line(lines: Sequence[str]) -> str:
    """The last line that says something, without pip's "ERROR:"."""
    told = [line.strip() for line in lines if not _UNIMPORTANT.match(line)]
    return told[-1].removeprefix("ERROR:").strip()[:300] if told else ""


def _sentence(kind: Kind, lines: Sequence[str], offline: bool, program: str) -> str:
    text = "\n".join(lines)
    if kind == "proxy":
        return _(
            "The package server cannot be reached through the proxy; ask your IT for the proxy's address, set the"
            " environment variable HTTPS_PROXY to it, start Slicer again, or install from a wheel folder."
        )
    if kind == "certificate":
        return _(
            "The connection is not trusted, which a hospital's firewall can cause; ask your IT for its certificate and set"
            " the environment variable PIP_CERT to that file, or install from a wheel folder."
        )
    if kind == "network":
        return _("The package server cannot be reached; check the network connection, or install from a wheel folder.")
    if kind == "disk":
        return _("The disk is full; free some space (up to 6 GB are needed) and press Install again.")
    if kind == "in_use":
        return _("Slicer itself holds files that have to change; restart Slicer, and continue here before anything else.")
    if kind == "permission":
        return _(
            "Slicer's folder cannot be written to; install Slicer in a folder of your own, or start it with the rights to"
            " write there, or choose another Python for the worker."
        )
    if kind == "conflict":
        found = _CONFLICT.search(text)
        what = (found.group(1) or found.group(2)) if found else last_line(lines)
        return _(
            "Another extension's packages do not go together with what is needed ({what}); choose another Python for the"
            " worker."
        ).format(what=what)
    if kind == "no_match":
        return _no_match(text, offline)
    line = last_line(lines) or _("it did not say why")
    text = _("{program} failed: {line}; see the details, or choose another Python for the worker.")
    return text.format(program=program, line=line.rstrip("."))


def _no_match(text: str, offline: bool) -> str:
    found = _WANTED.search(text)
    name = re.split(r"[<>=!~\[;,]", next(filter(None, found.groups())), maxsplit=1)[0] if found else "a package"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if offline:
        sentence = _("The wheel folder has no {name} for Python {python} and this system; add it and press Install again.")
    else:
        sentence = _("The package server has no {name} for Python {python} and this system; choose another Python.")
    return sentence.format(name=name, python=python)

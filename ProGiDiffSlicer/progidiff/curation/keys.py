"""Opaque keys by which cases of one volume, or of one patient, are kept on one side of a split.

Whoever holds a set holds the images in it, so its keys have to hide no more than what is not in it: which patient that was.
A patient's ID is short and could be guessed; it is hashed with a secret of the person who saves, which never enters the set.
Two people who save cases of one patient therefore give different patient keys: then only the same volume joins the cases.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from progidiff.curation.case import CuratedCase

_LENGTH = 32


def volume_key(secret: bytes | str, content: np.ndarray | bytes | str) -> str:
    """Key of a volume: HMAC-SHA256 of its content, hex.

    Args:
        secret: the set's own secret.
        content: voxels (K, J, I), or a digest of them.
    """
    if isinstance(content, np.ndarray):
        header = repr((content.shape, content.dtype.str)).encode()
        content = header + np.ascontiguousarray(content).tobytes()
    return _keyed(secret, content)


def patient_key(secret: bytes | str, identity: bytes | str) -> str:
    """Key of a patient: HMAC-SHA256 of an identifier, hex.

    Args:
        secret: of the person who saves; never the set's.
        identity: what identifies the patient, such as the DICOM patient ID and its issuer.
    """
    return _keyed(secret, identity)


def patient_groups(cases: Iterable[CuratedCase]) -> dict[str, str]:
    """Group of every case by its id: cases that share a volume or a patient key share a group, also through others."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    ordered = sorted(cases, key=lambda case: case.id)
    for case in ordered:
        own = root(f"case {case.id}")
        for key in (f"volume {case.volume_key}", f"patient {case.patient_key}" if case.patient_key else ""):
            if key:
                parent[root(key)] = own
                own = root(own)
    names: dict[str, str] = {}
    for case in ordered:  # named by their first case, so that the name does not depend on the order of reading
        names.setdefault(root(f"case {case.id}"), case.id)
    return {case.id: names[root(f"case {case.id}")] for case in ordered}


def _keyed(secret: bytes | str, content: bytes | str) -> str:
    key = secret.encode() if isinstance(secret, str) else secret
    message = content.encode() if isinstance(content, str) else content
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:_LENGTH]

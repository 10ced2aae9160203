"""The curated set: training examples that radiologists save, on a shared folder, with several people at once.

Standard library, numpy and SimpleITK only: the module in Slicer uses it too.
"""

from __future__ import annotations

from progidiff.curation.case import CuratedCase, NewCase, patient_groups, patient_key, volume_key
from progidiff.curation.curated_set import CuratedSet, Problem
from progidiff.curation.transfer import Exported, Merged

__all__ = [
    "CuratedCase",
    "CuratedSet",
    "Exported",
    "Merged",
    "NewCase",
    "Problem",
    "patient_groups",
    "patient_key",
    "volume_key",
]

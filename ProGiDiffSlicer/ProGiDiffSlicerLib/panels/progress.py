"""Words for the time that is left."""

from __future__ import annotations

from slicer.i18n import tr as _

# Below this an estimate in seconds would flicker.
_SOON_S = 3
_MINUTE_S = 60


def remaining(seconds: float | None) -> str:
    """How long something will still take, or nothing where that is not known."""
    if seconds is None or seconds < 0:
        return ""
    if seconds < _SOON_S:
        return _("a few seconds left")
    if seconds < 1.5 * _MINUTE_S:
        return _("about {seconds} s left").format(seconds=5 * max(1, round(seconds / 5)))
    return _("about {minutes} min left").format(minutes=round(seconds / _MINUTE_S))

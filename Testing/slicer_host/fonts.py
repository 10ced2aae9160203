"""Fonts for text off screen."""

from __future__ import annotations

import warnings
from pathlib import Path

from PySide6 import QtGui, QtWidgets


def ensure() -> bool:
    """Make sure that text can be painted, with matplotlib's DejaVu fonts where the machine has none; False: it cannot."""
    families = QtGui.QFontDatabase.families()
    if not families:
        for path in _matplotlib_fonts():
            QtGui.QFontDatabase.addApplicationFont(str(path))
        families = QtGui.QFontDatabase.families()
    if not families:
        warnings.warn("no fonts on this machine: screenshots will have no text (install fonts-dejavu-core)", stacklevel=2)
        return False
    chosen = "DejaVu Sans" if "DejaVu Sans" in families else families[0]
    QtWidgets.QApplication.setFont(QtGui.QFont(chosen, 9))
    return True


def _matplotlib_fonts() -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    return sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf"))

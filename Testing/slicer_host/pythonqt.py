"""PythonQt's manners on PySide6's classes, so that code written for Slicer's Python runs as it is.

PythonQt (the bridge inside Slicer) reads a Qt property as an attribute (``edit.text``), PySide6 through a method
(``edit.text()``). The classes of PySide6 are changed in place: every Q_PROPERTY becomes an attribute, ``connect`` takes
signature strings, and an object made in C++ refuses attributes that it does not have.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterable
from typing import Any

import shiboken6
from PySide6 import QtCore, QtWidgets

from . import signatures

# Their getters are virtual: an attribute in the class would be taken for an override and call itself.
_VIRTUAL_GETTERS = frozenset({"minimumSizeHint", "sizeHint"})
_METHODS_IN_PYTHONQT = frozenset({"parent"})
_read_property = QtCore.QObject.property
_write_property = QtCore.QObject.setProperty
_plain_setattr = shiboken6.Shiboken.Object.__setattr__


class QtProperty:
    """One Q_PROPERTY as an attribute; on the class it stays what it was (``QTimer.singleShot`` is also a static method)."""

    def __init__(self, name: str, getter: Callable[[Any], Any] | None, writable: bool, original: Any) -> None:
        self._name = name
        self._getter = getter
        self._writable = writable
        self._original = original

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self if self._original is None else self._original
        return _read_property(instance, self._name) if self._getter is None else self._getter(instance)

    def __set__(self, instance: Any, value: Any) -> None:
        if not self._writable:
            raise AttributeError(f"Property '{self._name}' of {type(instance).__name__} object is not writable")
        _write_property(instance, self._name, accepted(self._name, _read_property(instance, self._name), value))


def accepted(name: str, current: Any, value: Any) -> Any:
    """``value`` as PythonQt would pass it to the property ``name``, which holds ``current`` now.

    Raises:
        AttributeError: None, a number for a text, a NumPy scalar or a path: PythonQt has no conversion for them.
    """
    kind = type(value).__name__
    if value is None and current is not None:
        raise AttributeError(f"Property '{name}' does not accept an object of type NoneType (None)")
    if type(value).__module__.partition(".")[0] in {"numpy", "pathlib"}:
        raise AttributeError(f"Property '{name}' does not accept an object of type {kind} ({value!r})")
    if isinstance(current, str) and not isinstance(value, str | bytes):
        raise AttributeError(f"Property '{name}' of type 'QString' does not accept an object of type {kind} ({value!r})")
    if isinstance(current, bool) and not isinstance(value, bool | int):
        raise AttributeError(f"Property '{name}' of type 'bool' does not accept an object of type {kind} ({value!r})")
    if isinstance(current, int | float) and isinstance(value, str):
        raise AttributeError(f"Property '{name}' is a number and does not accept an object of type {kind} ({value!r})")
    if isinstance(current, int) and not isinstance(current, bool) and isinstance(value, float):
        return int(value)
    return value


def _getter(cls: type, name: str) -> Callable[[Any], Any] | None:
    """The method of ``cls`` that reads the property ``name``, or None where only the meta object can."""
    capital = name[0].upper() + name[1:]
    for candidate in (name, f"is{capital}", f"has{capital}"):
        method = getattr(cls, candidate, None)
        if type(method).__name__ == "method_descriptor":
            return method
    return None


def _properties_become_attributes(cls: type) -> None:
    meta = cls.staticMetaObject  # type: ignore[attr-defined]
    for index in range(meta.propertyCount()):
        declared = meta.property(index)
        name = declared.name()
        inherited = index < meta.propertyOffset() and name not in vars(cls)
        if name in _VIRTUAL_GETTERS or name in _METHODS_IN_PYTHONQT or inherited:
            continue
        original = getattr(cls, name, None)
        if isinstance(original, QtProperty):
            continue
        setattr(cls, name, QtProperty(name, _getter(cls, name), declared.isWritable(), original))


def _enum_values_on_instances(cls: type) -> None:
    """``process.Running`` works in PythonQt; PySide6 knows the value on the class only."""
    for kind in [value for value in vars(cls).values() if isinstance(value, type) and issubclass(value, enum.Enum)]:
        for name, value in kind.__members__.items():
            if name not in cls.__dict__ and not hasattr(QtCore.QObject, name):
                setattr(cls, name, value)


def _connecting_getattribute(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def __getattribute__(self: Any, name: str) -> Any:
        # PySide6 finds these two before it looks into the class, so they are answered here.
        if name == "connect":
            return types.MethodType(signatures.connect, self)
        if name == "disconnect":
            return types.MethodType(signatures.disconnect, self)
        return original(self, name)

    return __getattribute__


def _strict_setattr(self: Any, name: str, value: Any) -> None:
    """Set ``name``; on an object made in C++ (or a stand-in for one) only what it already has.

    Raises:
        AttributeError: the object has no such property.
    """
    cls = type(self)
    found = getattr(cls, name, None)
    declared = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    if isinstance(declared, QtProperty):
        declared.__set__(self, value)
    elif isinstance(declared, QtCore.Property):
        if getattr(declared, "fset", None) is None:
            raise AttributeError(f"Property '{name}' of {cls.__name__} object is not writable")
        declared.fset(self, accepted(name, declared.fget(self), value))
    elif type(value).__name__ in {"SignalInstance", "Signal"}:
        _plain_setattr(self, name, value)
    elif is_made_in_cpp(cls) and not (getattr(cls, "stand_in", False) and name.startswith("_")):
        if found is not None and not isinstance(declared, property):
            raise AttributeError(f"Slot, signal or method '{name}' can not be overwritten on {cls.__name__} object")
        if isinstance(declared, property):
            declared.__set__(self, value)
        elif name in [bytes(each.data()).decode() for each in self.dynamicPropertyNames()]:
            _write_property(self, name, value)
        else:
            raise AttributeError(
                f"'{name}' does not exist on {cls.__name__} and creating new attributes on C++ objects is not allowed"
            )
    else:
        _plain_setattr(self, name, value)


def is_made_in_cpp(cls: type) -> bool:
    """Whether Slicer has this class from C++: Qt's own, or one that a stand-in of this host replaces."""
    return cls.__module__.startswith("PySide6") or bool(vars(cls).get("stand_in", False))


def apply(classes: Iterable[type]) -> None:
    """Change ``classes`` (all of Qt's QObject classes, bases included) in place; calling it again changes nothing."""
    ordered = sorted(set(classes), key=lambda cls: len(cls.__mro__))
    if getattr(QtCore.QObject, "pythonqt_manners", False):
        return
    # Read first: once a base class is changed, its subclasses that have no slot of their own would report the changed one.
    own = {cls: cls.__getattribute__ for cls in ordered}
    for cls in ordered:
        _properties_become_attributes(cls)
        _enum_values_on_instances(cls)
    for cls in ordered:  # each class by itself: PySide6's types do not take these two from their base
        cls.__getattribute__ = _connecting_getattribute(own[cls])  # type: ignore[assignment]
        cls.__setattr__ = _strict_setattr  # type: ignore[assignment]
    root = QtCore.QObject
    root.name = property(lambda self: self.objectName, lambda self, new: self.setObjectName(new))  # type: ignore[attr-defined]
    root.className = lambda self: self.metaObject().className()  # type: ignore[attr-defined]
    root.delete = lambda self: shiboken6.delete(self)  # type: ignore[attr-defined]
    for cls in (QtWidgets.QDialog, QtWidgets.QMenu, QtCore.QCoreApplication, QtCore.QEventLoop):
        cls.exec_ = cls.exec  # type: ignore[attr-defined]
    root.pythonqt_manners = True  # type: ignore[attr-defined]

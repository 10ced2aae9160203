"""What the stand-ins for widgets of CTK and Slicer are made with.

A stand-in offers what the table of ``facts`` says of its class and nothing more: a kinder one would let code pass that the
real application refuses. ``tests/test_host_facts.py`` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from PySide6.QtCore import Property

from . import facts, ui_loader

_Class = TypeVar("_Class", bound=type)
#: The stand-ins that are no widgets, with the names of their classes.
others: dict[type, str] = {}


def kept(
    kind: Any, name: str, default: Any, changed: str | None = None, apply: Callable[[Any, Any], None] | None = None
) -> Any:
    """A Qt property ``name`` that keeps its value, applies it and emits the signal ``changed`` when it is another one.

    A list is read as a tuple, as PythonQt hands it out.
    """
    key = f"_{name}_value"

    def read(self: Any) -> Any:
        value = self.__dict__.get(key, default)
        return tuple(value) if kind is list else value

    def write(self: Any, new: Any) -> None:
        old = read(self)
        self.__dict__[key] = new
        if apply is not None:
            apply(self, new)
        if changed is not None and old != new:
            getattr(self, changed).emit(new)

    return Property(kind, read, write)


def forwarded(kind: Any, name: str, part: str) -> Any:
    """A Qt property ``name`` that belongs to the widget in the attribute ``part``."""

    def write(self: Any, new: Any) -> None:
        setattr(getattr(self, part), name, new)

    return Property(kind, lambda self: getattr(getattr(self, part), name), write)


def stand_in(module: Any) -> Callable[[_Class], _Class]:
    """Class decorator: the class takes the place of the C++ class of the same name in ``module`` and in ``.ui`` files.

    A property gets its ``setX`` method where that is a slot or invokable; objects refuse attributes that the class does not
    have.
    """

    def decorate(cls: _Class) -> _Class:
        reach = facts.of(cls.__name__)
        own = [base for base in cls.__mro__ if base.__module__.startswith(f"{__package__}.")]
        for name, declared in [each for base in own for each in vars(base).items()]:
            setter = f"set{name[0].upper()}{name[1:]}"
            if isinstance(declared, Property) and not hasattr(cls, setter) and setter in reach.methods:
                setattr(cls, setter, _setter(name))
        cls.stand_in = True  # type: ignore[attr-defined]
        cls.__getattr__ = _missing(cls.__name__)  # type: ignore[attr-defined]
        setattr(module, cls.__name__, cls)
        ui_loader.registry[cls.__name__] = cls
        return cls

    return decorate


def stands_for(name: str) -> Callable[[_Class], _Class]:
    """Class decorator for what stands in for an object that Slicer hands out, of the class ``name`` of the table."""

    def decorate(cls: _Class) -> _Class:
        others[cls] = name
        cls.__getattr__ = _missing(name)  # type: ignore[attr-defined]
        return cls

    return decorate


def _missing(cls: str) -> Callable[[Any, str], Any]:
    """What is said of a member that the stand-in has not."""

    def __getattr__(self: Any, name: str) -> Any:
        reach = facts.of(cls)
        if name in reach.properties or name in reach.methods or name in reach.signals:
            raise NotImplementedError(f"{cls}.{name} is there in Slicer {facts.chosen}: add it to its stand-in in this host")
        raise AttributeError(f"{cls} has no attribute named '{name}'")

    return __getattr__


def _setter(name: str) -> Callable[[Any, Any], None]:
    def set_value(self: Any, new: Any) -> None:
        setattr(self, name, new)

    return set_value

"""``@parameterPack``: several values that are one parameter, and the range of two numbers that Slicer ships."""

from __future__ import annotations

import typing
from typing import Any

import slicer

from .annotations import Default, findFirstAnnotation, split_dotted
from .serializers import Serializer, make_serializer


class Member:
    """One value of a pack."""

    def __init__(self, kind: Any, assigned: Any, has_assigned: bool) -> None:
        self.kind = kind
        self.serializer, rest = make_serializer(kind)
        chosen = findFirstAnnotation(rest, Default)
        self._default = assigned if has_assigned else chosen.value if chosen is not None else self.serializer.default()
        self.serializer.validate(self._default)

    def default(self) -> Any:
        """The value that a new pack has."""
        return self._default


def isParameterPack(kind: Any) -> bool:
    """Whether a class or an object is a parameter pack."""
    return bool(getattr(kind, "_is_parameterPack", False))


def parameterPack(classtype: Any = None) -> Any:
    """Class decorator: every annotated member becomes a checked value of the pack.

    Raises:
        ValueError: the class has no annotated member, or a default that its own annotations refuse.
    """
    return _make_pack if classtype is None else _make_pack(classtype)


def _make_pack(cls: Any) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    if not hints:
        raise ValueError("Unable to find any members in parameterPack")
    members = {name: Member(kind, getattr(cls, name, None), hasattr(cls, name)) for name, kind in hints.items()}
    for name, member in members.items():
        setattr(cls, name, _checked_property(name, member.serializer))
    own_init = cls.__dict__.get("__init__")

    def __init__(self: Any, *values: Any, **named: Any) -> None:
        self.__dict__.update({f"_{name}_value": member.default() for name, member in members.items()})
        if own_init is not None:
            own_init(self, *values, **named)
            return
        given = dict(zip(members, values, strict=False)) | named
        if len(values) > len(members) or not set(given) <= set(members):
            raise TypeError(
                f"__init__() got an unexpected argument: {', '.join(sorted(set(named) - set(members))) or values}"
            )
        for name, value in given.items():
            setattr(self, name, value)

    cls.__init__ = __init__
    cls.allParameters = members
    cls._is_parameterPack = True
    cls.getValue = _get_value
    cls.setValue = _set_value
    cls.dataType = staticmethod(lambda name: _data_type(cls, name))
    if "__eq__" not in cls.__dict__:
        cls.__eq__ = lambda self, other: (
            isPackOfSameKind(self, other) and all(getattr(self, name) == getattr(other, name) for name in members)
        )
        cls.__hash__ = None
    if "__repr__" not in cls.__dict__:
        cls.__repr__ = lambda self: f"{cls.__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in members)})"
    return cls


def isPackOfSameKind(one: Any, other: Any) -> bool:
    """Whether the two are packs of the same class, kept in a node or not."""
    return isParameterPack(other) and list(one.allParameters) == list(other.allParameters)


def _checked_property(name: str, serializer: Serializer) -> property:
    def write(self: Any, value: Any) -> None:
        serializer.validate(value)
        self.__dict__[f"_{name}_value"] = value
        save = self.__dict__.get("_save")
        if save is not None:
            save(self)

    return property(lambda self: self.__dict__[f"_{name}_value"], write)


def _get_value(self: Any, name: str) -> Any:
    first, rest = split_dotted(name)
    value = getattr(self, first)
    return value if rest is None else value.getValue(rest)


def _set_value(self: Any, name: str, value: Any) -> None:
    first, rest = split_dotted(name)
    if rest is None:
        setattr(self, first, value)
        return
    part = getattr(self, first)
    part.setValue(rest, value)
    setattr(self, first, part)


def _data_type(cls: Any, name: str) -> Any:
    first, rest = split_dotted(name)
    if first not in cls.allParameters:
        raise ValueError(f"{cls} has no member '{first}'")
    kind = cls.allParameters[first].kind
    return kind if rest is None else kind.dataType(rest)


class PackSerializer(Serializer):
    """A pack in a node: ``name.member`` for each of its members. What is read writes itself back when it is changed."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        self._kind = kind

    def validate(self, value: Any) -> None:
        super().validate(value)
        if not isinstance(value, self._kind):
            raise TypeError(f"Value must be of type '{self._kind}', is type '{type(value)}'")

    def isIn(self, node: Any, name: str) -> bool:
        first = next(iter(self._kind.allParameters))
        return self._kind.allParameters[first].serializer.isIn(node, f"{name}.{first}")

    def put(self, node: Any, name: str, value: Any) -> None:
        with slicer.util.NodeModify(node):
            for member, info in self._kind.allParameters.items():
                info.serializer.write(node, f"{name}.{member}", getattr(value, member))

    def read(self, node: Any, name: str) -> Any:
        pack = self._kind.__new__(self._kind)
        for member, info in self._kind.allParameters.items():
            pack.__dict__[f"_{member}_value"] = info.serializer.read(node, f"{name}.{member}")
        pack.__dict__["_save"] = lambda changed: self.write(node, name, changed)
        return pack

    def remove(self, node: Any, name: str) -> None:
        for member, info in self._kind.allParameters.items():
            info.serializer.remove(node, f"{name}.{member}")


@parameterPack
class FloatRange:
    """Two numbers of which the first is not larger than the second."""

    _minimum: float
    _maximum: float

    def __init__(self, minimum: float = 0, maximum: float = 0) -> None:
        self.setRange(minimum, maximum)

    @property
    def minimum(self) -> float:
        """The lower end."""
        return self._minimum

    @minimum.setter
    def minimum(self, value: float) -> None:
        self.setRange(value, self._maximum)

    @property
    def maximum(self) -> float:
        """The upper end."""
        return self._maximum

    @maximum.setter
    def maximum(self, value: float) -> None:
        self.setRange(self._minimum, value)

    def setRange(self, minimum: float, maximum: float) -> None:
        """Set both ends.

        Raises:
            ValueError: the lower end is above the upper one.
        """
        if not minimum <= maximum:
            raise ValueError(f"FloatRange must have minimum <= maximum: {minimum} <= {maximum}")
        self._minimum = minimum
        self._maximum = maximum

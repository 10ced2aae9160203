"""What may stand in ``Annotated[...]`` of a parameter: validators, defaults, hints for widgets."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any


class Validator:
    """Base of all validators; own ones derive from it."""

    def validate(self, value: Any) -> None:
        """Raise ValueError or TypeError where ``value`` is not allowed."""
        raise NotImplementedError


class NotNone(Validator):
    """The value must not be None."""

    def validate(self, value: Any) -> None:
        if value is None:
            raise ValueError("Value must not be None")


class IsNone(Validator):
    """The value must be None."""

    def validate(self, value: Any) -> None:
        if value is not None:
            raise ValueError("Value must be None")


@dataclass
class IsInstance(Validator):
    """The value must be None or of ``classtype`` (a class or a tuple of them)."""

    classtype: Any

    def validate(self, value: Any) -> None:
        if value is not None and not isinstance(value, self.classtype):
            raise TypeError(f"Value must be of type '{self.classtype}', is type '{type(value)}' value '{value}'")


@dataclass
class WithinRange(Validator):
    """The value must lie between the two, both included."""

    minimum: Any
    maximum: Any

    def validate(self, value: Any) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


@dataclass
class Minimum(Validator):
    """The value must not be smaller."""

    minimum: Any

    def validate(self, value: Any) -> None:
        if value < self.minimum:
            raise ValueError(f"Value must be greater than {self.minimum}, is {value}")


@dataclass
class Maximum(Validator):
    """The value must not be larger."""

    maximum: Any

    def validate(self, value: Any) -> None:
        if value > self.maximum:
            raise ValueError(f"Value must be smaller than {self.maximum}, is {value}")


@dataclass
class Choice(Validator):
    """The value must be one of these."""

    choices: Any

    def validate(self, value: Any) -> None:
        if value not in self.choices:
            raise ValueError(f"Value is {value}, but must be in one of the following: {self.choices}")


@dataclass
class Exclude(Validator):
    """The value must be none of these."""

    excludedValues: Any

    def validate(self, value: Any) -> None:
        if value in self.excludedValues:
            raise ValueError(f"Value is {value}, but must not be an excluded value: excluded values {self.excludedValues}")


@dataclass
class RangeBounds(Validator):
    """Both ends of the range must lie between the two."""

    minimum: Any
    maximum: Any

    def validate(self, value: Any) -> None:
        if not (self.minimum <= value.minimum and value.maximum <= self.maximum):
            raise ValueError(
                f"Range must be within the bound of [{self.minimum}, {self.maximum}], is [{value.minimum}, {value.maximum}]"
            )


@dataclass
class Decimals:
    """Digits behind the point that a spin box or slider shows."""

    value: int


@dataclass
class SingleStep:
    """Step of a spin box or slider."""

    value: float


class Default:
    """The value that a parameter begins with, or what makes it."""

    def __init__(self, value: Any = None, *, generator: Callable[[], Any] | None = None) -> None:
        self._value = value
        self._generator = generator

    @property
    def value(self) -> Any:
        """The value; made anew each time where there is a generator."""
        return self._value if self._generator is None else self._generator()


def splitAnnotations(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """``Annotated[int, x]`` gives ``(int, (x,))``, ``int`` gives ``(int, ())``."""
    bare, *rest = typing.get_args(Annotated[kind, "end"])
    return bare, tuple(rest[:-1])


def unannotatedType(kind: Any) -> Any:
    """The type without its annotations."""
    return splitAnnotations(kind)[0]


def findFirstAnnotation(annotations: Iterable[Any], kind: type) -> Any:
    """The first annotation of that class, or None."""
    return next((each for each in annotations if isinstance(each, kind)), None)


def members_of_union(kind: Any) -> tuple[Any, ...]:
    """``A | B`` and ``Union[A, B]`` give ``(A, B)``; anything else an empty tuple."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return typing.get_args(kind)
    return ()


def split_dotted(name: str) -> tuple[str, str | None]:
    """``"a.b.c"`` gives ``("a", "b.c")``, ``"a"`` gives ``("a", None)``."""
    first, dot, rest = name.partition(".")
    return first, rest if dot else None

"""How one parameter is kept in a ``vtkMRMLScriptedModuleNode``: the same keys and texts as in Slicer's own scenes."""

from __future__ import annotations

import enum
import pathlib
import typing
from collections.abc import Callable
from typing import Any

import slicer

from .annotations import IsInstance, IsNone, NotNone, Validator, members_of_union, splitAnnotations
from .observed import ObservedDict, ObservedList


class Serializer:
    """Reads and writes values of one type. ``validators`` run before every write."""

    cached = True

    def __init__(self, default: Any, validators: list[Validator] | None = None) -> None:
        self._default = default
        self.validators = list(validators or [])

    def default(self) -> Any:
        """The value of a parameter that has no other default."""
        return self._default() if callable(self._default) else self._default

    def validate(self, value: Any) -> None:
        """Raise where ``value`` is not allowed."""
        for validator in self.validators:
            validator.validate(value)

    def isIn(self, node: Any, name: str) -> bool:
        """Whether ``node`` holds a value under ``name``."""
        return bool(node.HasParameter(name))

    def write(self, node: Any, name: str, value: Any) -> None:
        """Check ``value`` and keep it under ``name``."""
        self.validate(value)
        self.put(node, name, value)

    def put(self, node: Any, name: str, value: Any) -> None:
        raise NotImplementedError

    def read(self, node: Any, name: str) -> Any:
        """The value under ``name``."""
        raise NotImplementedError

    def remove(self, node: Any, name: str) -> None:
        """Forget the value under ``name``."""
        node.UnsetParameter(name)


class TextSerializer(Serializer):
    """Everything that is one line of text in the node: numbers, strings, booleans, paths, enumerations."""

    def __init__(self, kind: Any, default: Any, write: Callable[[Any], str], read: Callable[[str], Any]) -> None:
        super().__init__(default, [NotNone(), IsInstance((int, float) if kind is float else kind)])
        self._to_text = write
        self._from_text = read

    def put(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, self._to_text(value))

    def read(self, node: Any, name: str) -> Any:
        return self._from_text(node.GetParameter(name))


class NodeSerializer(Serializer):
    """A MRML node: a node reference, and an empty parameter that says that None was meant."""

    def __init__(self, kind: Any) -> None:
        super().__init__(None, [IsInstance(kind)])

    def put(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, None if value is None else value.GetID())

    def read(self, node: Any, name: str) -> Any:
        return node.GetNodeReference(name)

    def remove(self, node: Any, name: str) -> None:
        node.UnsetParameter(name)
        node.RemoveNodeReferenceIDs(name)


class NoneSerializer(Serializer):
    """None, as one of the types of a union."""

    def __init__(self) -> None:
        super().__init__(None, [IsNone()])

    def put(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, "True")

    def read(self, node: Any, name: str) -> Any:
        return None


class ListSerializer(Serializer):
    """``list[X]``: ``name.len`` and ``name.0``, ``name.1`` …"""

    def __init__(self, element: Serializer) -> None:
        super().__init__(list)
        self._element = element
        self.cached = element.cached

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(f"{name}.len"))

    def put(self, node: Any, name: str, value: Any) -> None:
        values = list(value)
        for each in values:
            self._element.validate(each)
        with slicer.util.NodeModify(node):
            self.remove(node, name)
            for index, each in enumerate(values):
                self._element.write(node, f"{name}.{index}", each)
            node.SetParameter(f"{name}.len", str(len(values)))

    def read(self, node: Any, name: str) -> Any:
        return ObservedList(
            node, self, name, [self._element.read(node, f"{name}.{index}") for index in self._range(node, name)]
        )

    def remove(self, node: Any, name: str) -> None:
        for index in self._range(node, name):
            self._element.remove(node, f"{name}.{index}")
        node.UnsetParameter(f"{name}.len")

    def _range(self, node: Any, name: str) -> range:
        return range(int(node.GetParameter(f"{name}.len") or 0))


class TupleSerializer(Serializer):
    """``tuple[X, Y]``: ``name.0``, ``name.1`` …"""

    def __init__(self, elements: list[Serializer]) -> None:
        super().__init__(lambda: tuple(each.default() for each in elements))
        self._elements = elements
        self.cached = all(each.cached for each in elements)

    def isIn(self, node: Any, name: str) -> bool:
        return self._elements[0].isIn(node, f"{name}.0")

    def put(self, node: Any, name: str, value: Any) -> None:
        with slicer.util.NodeModify(node):
            for index, (element, each) in enumerate(zip(self._elements, tuple(value), strict=True)):
                element.write(node, f"{name}.{index}", each)

    def read(self, node: Any, name: str) -> Any:
        return tuple(element.read(node, f"{name}.{index}") for index, element in enumerate(self._elements))

    def remove(self, node: Any, name: str) -> None:
        for index, element in enumerate(self._elements):
            element.remove(node, f"{name}.{index}")


class DictSerializer(ListSerializer):
    """``dict[X, Y]``: a list of pairs, in order."""

    def __init__(self, key: Serializer, value: Serializer) -> None:
        super().__init__(TupleSerializer([key, value]))
        self._default = dict

    def put(self, node: Any, name: str, value: Any) -> None:
        super().put(node, name, value.items())

    def read(self, node: Any, name: str) -> Any:
        return ObservedDict(node, self, name, dict(super().read(node, name)))


class UnionSerializer(Serializer):
    """``X | Y | None``: the value under ``name.<which type>``."""

    def __init__(self, elements: list[Serializer]) -> None:
        optional = len(elements) == 2 and isinstance(elements[1], NoneSerializer)
        super().__init__(None if optional else elements[0].default)
        self._elements = elements
        self.cached = all(each.cached for each in elements)

    def isIn(self, node: Any, name: str) -> bool:
        return any(element.isIn(node, f"{name}.{index}") for index, element in enumerate(self._elements))

    def validate(self, value: Any) -> None:
        super().validate(value)
        self._fitting(value)

    def put(self, node: Any, name: str, value: Any) -> None:
        index = self._fitting(value)
        with slicer.util.NodeModify(node):
            self.remove(node, name)
            self._elements[index].write(node, f"{name}.{index}", value)

    def read(self, node: Any, name: str) -> Any:
        for index, element in enumerate(self._elements):
            if element.isIn(node, f"{name}.{index}"):
                return element.read(node, f"{name}.{index}")
        raise KeyError(f"Unable to find value for name: {name}")

    def remove(self, node: Any, name: str) -> None:
        for index, element in enumerate(self._elements):
            element.remove(node, f"{name}.{index}")

    def _fitting(self, value: Any) -> int:
        """The type that takes ``value``; a node type takes None only where no type says so itself."""
        fallback = None
        for index, element in enumerate(self._elements):
            try:
                element.validate(value)
            except (TypeError, ValueError, AttributeError):
                continue
            if value is not None or isinstance(element, NoneSerializer):
                return index
            fallback = index if fallback is None else fallback
        if fallback is None:
            raise TypeError(f"Unable to write value '{value}' of type '{type(value)}'")
        return fallback


def make_serializer(kind: Any) -> tuple[Serializer, list[Any]]:
    """The serializer of a type, annotated or not, and the annotations that it did not use.

    Raises:
        TypeError: no parameter can be of that type.
    """
    bare, annotations = splitAnnotations(kind)
    serializer = _of_bare_type(bare)
    serializer.validators += [each for each in annotations if isinstance(each, Validator)]
    return serializer, [each for each in annotations if not isinstance(each, Validator)]


def _of_bare_type(kind: Any) -> Serializer:
    from .packs import PackSerializer, isParameterPack

    members, arguments, origin = members_of_union(kind), typing.get_args(kind), typing.get_origin(kind)
    if members:
        return UnionSerializer([make_serializer(each)[0] for each in members])
    if origin is list:
        return ListSerializer(make_serializer(arguments[0])[0])
    if origin is tuple:
        return TupleSerializer([make_serializer(each)[0] for each in arguments])
    if origin is dict:
        return DictSerializer(make_serializer(arguments[0])[0], make_serializer(arguments[1])[0])
    if kind is bool:
        return TextSerializer(bool, False, str, lambda text: text == "True")
    if kind in (int, float):
        return TextSerializer(kind, 0, str, kind)
    if kind is str:
        return TextSerializer(str, "", str, str)
    if kind is type(None):
        return NoneSerializer()
    if isParameterPack(kind):
        return PackSerializer(kind)
    if isinstance(kind, type) and issubclass(kind, pathlib.PurePath):
        return TextSerializer(kind, kind, str, kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return TextSerializer(kind, lambda: next(iter(kind)), lambda value: value.name, lambda text: kind[text])
    if isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode):
        return NodeSerializer(kind)
    raise TypeError(f"Unable to create serializer for type: {kind}")

"""A stand-in for ``slicer.parameterNodeWrapper``: same names, same keys in the node, same pairs of widget and type.

Numbers, texts, booleans, enumerations, MRML nodes and lists of them; no unions, dictionaries, packs and ranges.
"""

from __future__ import annotations

import enum
import typing
import weakref
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from typing import Annotated, Any

import qt
import slicer
import vtk

from . import facts

__all__ = ["IsInstance", "NotNone", "Validator", "WithinRange", "createGuiConnector", "parameterNodeWrapper"]

_NUMBER_WIDGETS = ("QDoubleSpinBox", "ctkSliderWidget", "ctkDoubleSpinBox")


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


def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """``Annotated[int, x]`` gives ``(int, (x,))``, ``int`` gives ``(int, ())``."""
    bare, *rest = typing.get_args(Annotated[kind, "end"])
    return bare, tuple(rest[:-1])


class Serializer:
    """Reads and writes values of one type, by default as one line of text. ``validators`` run before every write."""

    def __init__(
        self, default: Any, validators: list[Validator], write: Callable[[Any], str] = str, read: Callable[[str], Any] = str
    ) -> None:
        self._default = default
        self.validators = validators
        self._to_text = write
        self._from_text = read

    def default(self) -> Any:
        """The value of a parameter that has no other default."""
        return self._default() if callable(self._default) else self._default

    def isIn(self, node: Any, name: str) -> bool:
        """Whether ``node`` holds a value under ``name``."""
        return bool(node.HasParameter(name))

    def write(self, node: Any, name: str, value: Any) -> None:
        """Check ``value`` and keep it under ``name``."""
        for validator in self.validators:
            validator.validate(value)
        self.put(node, name, value)

    def put(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, self._to_text(value))

    def read(self, node: Any, name: str) -> Any:
        """The value under ``name``."""
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


class ListSerializer(Serializer):
    """``list[X]``: ``name.len`` and ``name.0``, ``name.1`` …"""

    def __init__(self, element: Serializer) -> None:
        super().__init__(list, [])
        self._element = element

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(f"{name}.len"))

    def put(self, node: Any, name: str, value: Any) -> None:
        values = list(value)
        for validator in self._element.validators:
            for each in values:
                validator.validate(each)
        with slicer.util.NodeModify(node):
            for index in range(self._length(node, name)):
                node.UnsetParameter(f"{name}.{index}")
            for index, each in enumerate(values):
                self._element.write(node, f"{name}.{index}", each)
            node.SetParameter(f"{name}.len", str(len(values)))

    def read(self, node: Any, name: str) -> Any:
        values = [self._element.read(node, f"{name}.{index}") for index in range(self._length(node, name))]
        return ObservedList(lambda changed: self.write(node, name, changed), values)

    def _length(self, node: Any, name: str) -> int:
        return int(node.GetParameter(f"{name}.len") or 0)


class ObservedList(MutableSequence[Any]):
    """A list that writes itself back into the parameter node when it is changed."""

    def __init__(self, save: Callable[[list[Any]], None], values: list[Any]) -> None:
        self._save = save
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[index] = value
        self._save(self._values)

    def __delitem__(self, index: Any) -> None:
        del self._values[index]
        self._save(self._values)

    def insert(self, index: int, value: Any) -> None:
        self._values.insert(index, value)
        self._save(self._values)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, list | ObservedList) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def _serializer(kind: Any) -> Serializer:
    """The serializer of a type, annotated or not.

    Raises:
        TypeError: no parameter of the host can be of that type.
    """
    bare, annotations = _split(kind)
    serializer = _of_bare_type(bare)
    serializer.validators += [each for each in annotations if isinstance(each, Validator)]
    return serializer


def _of_bare_type(kind: Any) -> Serializer:
    if typing.get_origin(kind) is list:
        return ListSerializer(_serializer(typing.get_args(kind)[0]))
    text = [NotNone(), IsInstance((int, float) if kind is float else kind)]
    if kind is bool:
        return Serializer(False, text, str, lambda value: value == "True")
    if kind in (int, float, str):
        return Serializer(kind(), text, str, kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return Serializer(lambda: next(iter(kind)), text, lambda value: value.name, lambda value: kind[value])
    if isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode):
        return NodeSerializer(kind)
    raise TypeError(f"Unable to create serializer for type: {kind}")


class GuiConnector:
    """One widget that shows one parameter, and the signal that says that the user changed it."""

    def __init__(self, widget: Any, signal: str, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._signal = getattr(widget, signal)
        self.read = read
        self.write = write
        self._callback: Callable[[], None] | None = None

    def onChanged(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when the user changes the value; None: no more."""
        if self._callback is not None:
            self._signal.disconnect(self.changed)
        if callback is not None:
            self._signal.connect(self.changed)
        self._callback = callback

    def changed(self) -> None:
        """Pass the change on."""
        if self._callback is not None:
            self._callback()


def createGuiConnector(widget: Any, datatype: Any) -> GuiConnector:
    """The connector for a parameter of ``datatype`` in ``widget``.

    Raises:
        RuntimeError: there is none for that pair, or the widget needs a range that the annotations do not give.
    """
    bare, annotations = _split(datatype)
    name = type(widget).__name__
    if bare is bool and name in ("QCheckBox", "ctkCheckBox"):
        return _by_property(widget, "stateChanged", "checked", bool)
    if (bare is int and name in ("QSlider", "QSpinBox")) or (bare in (int, float) and name in _NUMBER_WIDGETS):
        if bare is int and name in _NUMBER_WIDGETS:
            widget.decimals = 0
        _set_range(widget, annotations, (-(2**31), 2**31 - 1) if bare is int else (float("-inf"), float("inf")))
        return _by_property(widget, "valueChanged", "value", bare)
    if name in ("QComboBox", "ctkComboBox") and isinstance(bare, type) and issubclass(bare, enum.Enum):
        return _combo_box(widget, bare)
    if bare is str and name == "QLineEdit":
        # Only when it differs: writing moves the cursor to the end.
        return GuiConnector(widget, "textChanged", lambda: widget.text, lambda text: _set_text_if_other(widget, text))
    if name == "qMRMLNodeComboBox" and isinstance(bare, type) and issubclass(bare, slicer.vtkMRMLNode):
        widget.nodeTypes = [bare().GetClassName()]
        return GuiConnector(widget, "currentNodeChanged", widget.currentNode, widget.setCurrentNode)
    raise RuntimeError(f"Unable to create GUI connector from datatype '{datatype}' to widget type '{type(widget)}'.")


def _by_property(widget: Any, signal: str, name: str, kind: Callable[[Any], Any]) -> GuiConnector:
    return GuiConnector(widget, signal, lambda: kind(getattr(widget, name)), lambda value: setattr(widget, name, value))


def _set_text_if_other(widget: Any, text: str) -> None:
    if widget.text != text:
        widget.text = text


def _set_range(widget: Any, annotations: tuple[Any, ...], unbounded: tuple[Any, Any]) -> None:
    within = next((each for each in annotations if isinstance(each, WithinRange)), None)
    if within is None and type(widget).__name__ in ("QSlider", "ctkSliderWidget"):
        raise RuntimeError(f"Cannot have a connection to {type(widget).__name__} where the type is unbounded.")
    widget.minimum, widget.maximum = unbounded if within is None else (within.minimum, within.maximum)


def _combo_box(widget: Any, kind: type[enum.Enum]) -> GuiConnector:
    choices = list(kind)
    label = getattr(kind, "label", lambda value: value.name)
    current = widget.currentIndex
    widget.clear()  # what the .ui file listed is lost in Slicer too
    for each in choices:
        widget.addItem(label(each))
    widget.currentIndex = max(0, min(current, len(choices) - 1))

    def write(value: Any) -> None:
        widget.currentIndex = choices.index(value)

    return GuiConnector(widget, "currentIndexChanged", lambda: choices[widget.currentIndex], write)


class Parameter:
    """One parameter of a wrapper class: its type, its serializer, its default."""

    def __init__(self, kind: Any, assigned: Any) -> None:
        self.kind = kind
        self.serializer = _serializer(kind)
        self.default = self.serializer.default() if assigned is None else assigned


class _Stored:
    """One parameter in one node, with the cached value that Slicer keeps too."""

    def __init__(self, parameter: Parameter, node: Any, name: str) -> None:
        self._serializer, self._node, self._name = parameter.serializer, node, name
        if not self._serializer.isIn(node, name):
            self._serializer.write(node, name, parameter.default)
        self._writing = False
        self.value = self._serializer.read(node, name)
        me = weakref.ref(self)
        self._tag = node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _changed(me()))

    def __del__(self) -> None:
        self._node.RemoveObserver(self._tag)

    def write(self, value: Any) -> None:
        self._writing = True
        try:
            with slicer.util.NodeModify(self._node):  # whoever hears of the change reads the new value
                self._serializer.write(self._node, self._name, value)
                self.value = self._serializer.read(self._node, self._name)
        finally:
            self._writing = False

    def refresh(self) -> None:
        if not self._writing and self._serializer.isIn(self._node, self._name):
            self.value = self._serializer.read(self._node, self._name)


def _changed(stored: _Stored | None) -> None:
    if stored is not None:
        stored.refresh()


class _Wrapper:
    """What every wrapper class can do."""

    allParameters: dict[str, Parameter]

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        self._guis: dict[int, dict[str, GuiConnector]] = {}
        self._observers: dict[int, int] = {}
        self._next_tag = 0
        self._updating = False
        self._stored = {
            name: _Stored(parameter, parameterNode, f"{prefix or ''}{name}")
            for name, parameter in self.allParameters.items()
        }

    def connectGui(self, gui: Any) -> int:
        """Bind every widget in ``gui`` (a widget, or what ``childWidgetVariables`` gives) that names a parameter."""
        widgets = gui.findChildren(qt.QWidget) if isinstance(gui, qt.QWidget) else vars(gui).values()
        named = {widget.property("SlicerParameterName"): widget for widget in widgets}
        return self.connectParametersToGui({name: widget for name, widget in named.items() if name})

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        missing = mapping.keys() - self.allParameters.keys()
        if missing:
            raise ValueError(
                f"Cannot find a param with the given name: {missing}; there are {', '.join(self.allParameters)}"
            )
        connectors = {name: createGuiConnector(widget, self.allParameters[name].kind) for name, widget in mapping.items()}
        tag = self._next_tag
        self._next_tag += 1
        self._guis[tag] = connectors
        for name, connector in connectors.items():
            connector.write(getattr(self, name))
            connector.onChanged(self._taking(name, connector))
        self._observers[tag] = self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._show_values())
        return tag

    def disconnectGui(self, tag: int) -> None:
        for connector in self._guis.pop(tag, {}).values():
            connector.onChanged(None)
        if tag in self._observers and facts.chosen != "5.10":  # which leaves it there
            self.RemoveObserver(self._observers.pop(tag))

    def _taking(self, name: str, connector: GuiConnector) -> Any:
        def take() -> None:
            if not self._updating:
                with slicer.util.NodeModify(self):
                    setattr(self, name, connector.read())

        return take

    def _show_values(self) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            with slicer.util.NodeModify(self):
                for connectors in list(self._guis.values()):
                    for name, connector in connectors.items():
                        connector.write(getattr(self, name))
        finally:
            self._updating = False

    def StartModify(self) -> Any:
        return self.parameterNode.StartModify()

    def EndModify(self, wasModified: Any) -> Any:
        return self.parameterNode.EndModify(wasModified)

    def AddObserver(self, event: Any, callback: Any, priority: float = 0.0) -> int:
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        self.parameterNode.RemoveObserver(tag)

    def Modified(self) -> None:
        self.parameterNode.Modified()


def parameterNodeWrapper(classtype: Any = None) -> Any:
    """Class decorator, with or without parentheses.

    Raises:
        TypeError: a member has a type that no parameter can have.
        ValueError: a member has a name that the wrapper itself needs.
    """
    return _wrap if classtype is None else _wrap(classtype)


def _wrap(cls: Any) -> Any:
    parameters = {}
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        if hasattr(_Wrapper, name) or name in {"parameterNode", "allParameters", "default"}:
            raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
        parameters[name] = Parameter(kind, getattr(cls, name, None))
        setattr(cls, name, _parameter_property(name))
    cls.allParameters = parameters
    for name, member in vars(_Wrapper).items():
        if name == "__init__" or (not name.startswith("__") and name != "allParameters"):
            setattr(cls, name, member)
    return cls


def _parameter_property(name: str) -> property:
    return property(lambda self: self._stored[name].value, lambda self, value: self._stored[name].write(value))

"""``@parameterNodeWrapper``: the members of a class are parameters of a ``vtkMRMLScriptedModuleNode``."""

from __future__ import annotations

import typing
import weakref
from typing import Any

import qt
import slicer
import vtk

from .. import facts
from .annotations import Default, findFirstAnnotation, split_dotted, unannotatedType
from .connectors import GuiConnector, createGuiConnector
from .serializers import make_serializer

SlicerParameterNamePropertyName = "SlicerParameterName"


class Parameter:
    """One parameter of a wrapper class: its type, its serializer, its default."""

    def __init__(self, name: str, kind: Any, assigned: Any, has_assigned: bool) -> None:
        self.name = name
        self.kind = kind
        self.serializer, rest = make_serializer(kind)
        chosen = findFirstAnnotation(rest, Default)
        self.default = Default(assigned) if has_assigned else chosen or Default(self.serializer.default())


class _Stored:
    """One parameter in one node, with the cached value that Slicer keeps too."""

    def __init__(self, parameter: Parameter, node: Any, name: str) -> None:
        self._serializer, self._node, self._name = parameter.serializer, node, name
        if not self._serializer.isIn(node, name):
            self._serializer.write(node, name, parameter.default.value)
        self._writing = False
        self._value = self._serializer.read(node, name)
        me = weakref.ref(self)
        self._tag = node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _changed(me()))

    def __del__(self) -> None:
        self._node.RemoveObserver(self._tag)

    def read(self) -> Any:
        return self._value if self._serializer.cached else self._serializer.read(self._node, self._name)

    def write(self, value: Any) -> None:
        self._writing = True
        try:
            with slicer.util.NodeModify(self._node):  # whoever hears of the change reads the new value
                self._serializer.write(self._node, self._name, value)
                self._value = self._serializer.read(self._node, self._name)
        finally:
            self._writing = False

    def refresh(self) -> None:
        if not self._writing and self._serializer.isIn(self._node, self._name):
            self._value = self._serializer.read(self._node, self._name)


def _changed(stored: _Stored | None) -> None:
    if stored is not None:
        stored.refresh()


class _Wrapper:
    """What every wrapper class can do."""

    allParameters: dict[str, Parameter]
    _is_parameter_node_wrapper = True

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

    def default(self, name: str) -> Default:
        self._check(name)
        return self.allParameters[name].default

    def isCached(self, name: str) -> bool:
        self._check(name)
        return self.allParameters[name].serializer.cached

    @classmethod
    def dataType(cls, name: str) -> Any:
        cls._check(name)
        first, rest = split_dotted(name)
        kind = cls.allParameters[first].kind
        return kind if rest is None else unannotatedType(kind).dataType(rest)

    def getValue(self, name: str) -> Any:
        self._check(name)
        first, rest = split_dotted(name)
        value = self._stored[first].read()
        return value if rest is None else value.getValue(rest)

    def setValue(self, name: str, value: Any) -> None:
        self._check(name)
        first, rest = split_dotted(name)
        if rest is None:
            self._stored[first].write(value)
        else:
            self._stored[first].read().setValue(rest, value)

    @classmethod
    def _check(cls, name: str) -> None:
        first, rest = split_dotted(name)
        if first not in cls.allParameters:
            raise ValueError(f"Cannot find a param with the given name: {first}; there are {', '.join(cls.allParameters)}")
        if rest is not None:
            unannotatedType(cls.allParameters[first].kind).dataType(rest)

    def connectGui(self, gui: Any) -> int:
        """Bind every widget in ``gui`` (a widget, or what ``childWidgetVariables`` gives) that names a parameter."""
        widgets = gui.findChildren(qt.QWidget) if isinstance(gui, qt.QWidget) else vars(gui).values()
        named = {widget.property(SlicerParameterNamePropertyName): widget for widget in widgets}
        return self.connectParametersToGui({name: widget for name, widget in named.items() if name})

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        for name in mapping:
            self._check(name)
        connectors = {
            name: widget if isinstance(widget, GuiConnector) else createGuiConnector(widget, self.dataType(name))
            for name, widget in mapping.items()
        }
        tag = self._next_tag
        self._next_tag += 1
        self._guis[tag] = connectors
        for name, connector in connectors.items():
            connector.write(self.getValue(name))
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
                    self.setValue(name, connector.read())

        return take

    def _show_values(self) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            with slicer.util.NodeModify(self):
                for connectors in list(self._guis.values()):
                    for name, connector in connectors.items():
                        connector.write(self.getValue(name))
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
        if hasattr(_Wrapper, name) or name in {"parameterNode", "allParameters"}:
            raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
        parameters[name] = Parameter(name, kind, getattr(cls, name, None), hasattr(cls, name))
        setattr(cls, name, _parameter_property(name))
    cls.allParameters = parameters
    for name, member in vars(_Wrapper).items():
        if name == "__init__" or (not name.startswith("__") and name != "allParameters"):
            setattr(cls, name, member)
    return cls


def _parameter_property(name: str) -> property:
    return property(lambda self: self._stored[name].read(), lambda self, value: self._stored[name].write(value))


def isParameterNodeWrapper(kind: Any) -> bool:
    """Whether a class or an object is a parameter node wrapper."""
    return bool(getattr(kind, "_is_parameter_node_wrapper", False))


def findChildWidgetForParameter(widget: Any, name: str) -> Any:
    """The child of ``widget`` that is bound to the parameter ``name``, or None."""
    children = widget.findChildren(qt.QWidget)
    return next((each for each in children if each.property(SlicerParameterNamePropertyName) == name), None)

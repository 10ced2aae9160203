"""What code for Slicer's Python (PythonQt) must not do, found in its syntax tree.

``python -m slicer_host.pythonqt_lint MyModule.py MyModuleLib Resources/UI`` lists what it finds in files and folders. The
host refuses most of it when it runs; this also finds it on lines that no test reaches, and what only the real application
would refuse. What ``.ui`` files and code want of widgets of CTK and Slicer is compared with the table of ``facts.py``.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import facts

# Qt properties that a program reads; read as attributes (rule 1). Items of tables and lists have methods of the same names.
PROPERTIES = frozenset(
    re.findall(
        r"\w+",
        """
        accessibleName alternatingRowColors autoDefault autoRaise buttonText cancelButtonText checkable checked collapsed
        columnCount currentColor currentIndex currentNodeID currentPath currentText cursorPosition decimals directory
        displayText down editable enabled flat font fullScreen geometry hasSelectedText html icon iconSize indent interval
        labelText layoutDirection margin maxLength maximum maximumHeight maximumValue maximumWidth minimum
        minimumHeight minimumValue minimumWidth modal movable nodeTypes noneEnabled objectName orientation pageStep palette
        placeholderText plainText prefix readOnly remainingTime rowCount segmentCount selectedText selectionMode
        shortcut shortcutEnabled singleShot singleStep sliderPosition spacing specialValueText statusTip styleSheet suffix
        text textVisible threeDViewCount toolTip tracking undoAvailable value visible whatsThis windowModality
        windowOpacity windowTitle wordWrap
        """,
    )
)
OTHER_QTS = frozenset({"PyQt5", "PyQt6", "PySide6"})
_NEEDS_PARENT = frozenset({"QTimer", "QProcess", "QShortcut", "QAction", "QCompleter", "QButtonGroup"})
_READS = frozenset({"readAll", "readAllStandardError", "readAllStandardOutput"})


# What these hold everywhere.
_HELD = {
    "slicer.app": "qSlicerApplication",
    "slicer.app.layoutManager()": "qSlicerLayoutManager",
    "slicer.app.moduleManager()": "qSlicerModuleManager",
}


def widget_classes(ui_files: Iterable[Path]) -> dict[str, str]:
    """The class of every widget in ``.ui`` files, by the name that code has for it: ``ui.name``.

    Raises:
        ValueError: two widgets of different classes have the same name.
    """
    found: dict[str, str] = {}
    for path in ui_files:
        for widget in ET.parse(path).getroot().iter("widget"):
            name, cls = f"ui.{widget.get('name')}", str(widget.get("class"))
            if found.setdefault(name, cls) != cls:
                raise ValueError(f"{name} is a {found[name]} and a {cls}: one name for one class, or the lint cannot tell")
    return found


_ASK_QT = """
import json, sys
from PySide6 import QtCore, QtGui, QtWidgets

def facts(cls):
    meta = cls.staticMetaObject
    methods = [meta.method(index) for index in range(meta.methodCount())]
    signals = [bytes(each.methodSignature().data()).decode() for each in methods if each.methodType().name == "Signal"]
    return [dir(cls), [meta.property(index).name() for index in range(meta.propertyCount())], signals]

parts = (QtWidgets, QtGui, QtCore)
found = {name: facts(next(getattr(part, name) for part in parts if hasattr(part, name))) for name in sys.argv[1:]}
names = {each for part in parts for name in dir(part) if name.startswith("Q") for each in dir(getattr(part, name))}
print(json.dumps({**found, "": [sorted(names), [], []]}))
"""


@cache
def _qt() -> dict[str, Any]:
    """What PySide says of the classes of Qt that those of the table derive from; "" holds the names of all classes.

    Asked of a process of its own: the tests change PySide's classes.
    """
    names = sorted({facts.reach(cls, facts.chosen).qt_base for cls in facts.table()})
    ran = subprocess.run([sys.executable, "-c", _ASK_QT, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(ran.stdout))


@cache
def of_qt(cls: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The public names, the properties and the signals (with arguments) of a class of Qt."""
    names, properties, signals = map(frozenset, _qt()[cls])
    return names, properties, signals


@cache
def plain_setters() -> frozenset[str]:
    """Setters of properties that are slots of no class of the table and methods of none of Qt's: wrong on anything."""
    every = [facts.reach(cls, version) for cls in facts.table() for version in facts.VERSIONS]
    setters = {f"set{name[0].upper()}{name[1:]}" for reach in every for name in reach.properties}
    return frozenset(setters - {name for reach in every for name in reach.methods} - of_qt("")[0])


@dataclass(frozen=True)
class Finding:
    """One breach: the line, the number of the rule, a sentence."""

    line: int
    rule: int
    message: str


def dotted(node: ast.AST) -> str:
    """``a.b().c`` as ``"a.b().c"``; an empty text for anything that is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    if isinstance(node, ast.Call):
        return f"{dotted(node.func)}()" if dotted(node.func) else ""
    return ""


def is_qt_constructor(node: ast.AST) -> bool:
    """``qt.QLabel(...)``, ``ctk.ctkX(...)``, ``slicer.qMRMLX(...)``."""
    if not isinstance(node, ast.Call):
        return False
    name = dotted(node.func)
    return bool(re.fullmatch(r"qt\.Q\w+|ctk\.ctk\w+|slicer\.q(MRML|Slicer)\w+", name))


class Rules:
    """The rules over one file; the arguments are those of ``findings``."""

    def __init__(self, source: str, held: Mapping[str, str], forbidden: Collection[str]) -> None:
        self.forbidden = OTHER_QTS.union(forbidden)
        self.tree = ast.parse(source)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.widgets = {
            dotted(target)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and is_qt_constructor(node.value)
            for target in node.targets
        } - {""}

        self.known = {**_HELD, **held}
        self.held = dict(self.known)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._hold(target, node.value)
        self.own = {node.name for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}

    def _hold(self, target: ast.AST, value: ast.AST) -> None:
        """Know what ``box = self.ui.rangeWidget`` and ``box = ctk.ctkRangeWidget()`` put into a name."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._hold(one, other)
        cls = dotted(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else self.real_class(value)
        if cls in facts.table() and dotted(target):
            self.held[self._scoped(target)] = cls

    def _scoped(self, node: ast.AST) -> str:
        """The name, and for a plain one the function in which it is meant."""
        if not isinstance(node, ast.Name) or node.id in self.known:
            return dotted(node)
        scope: ast.AST = node
        while scope in self.parents and not isinstance(scope, ast.FunctionDef):
            scope = self.parents[scope]
        return f"{getattr(scope, 'name', '')}:{getattr(scope, 'lineno', 0)}:{node.id}"

    def real_class(self, node: ast.AST) -> str | None:
        """The class of the table that the expression is of, where that can be told."""
        in_ui = re.search(r"(^|\.)_?ui\.(\w+)$", dotted(node))
        cls = self.known.get(f"ui.{in_ui[2]}") if in_ui else self.held.get(self._scoped(node))
        return cls if cls in facts.table() else None

    def is_widget(self, node: ast.AST) -> bool:
        """Whether the expression is something that Qt made: assigned from a constructor, or a child of a loaded ``.ui``."""
        name = dotted(node)
        return name in self.widgets or bool(re.fullmatch(r"(self\.)?_?ui\.\w+", name)) or is_qt_constructor(node)

    def findings(self) -> Iterator[Finding]:
        for node in ast.walk(self.tree):
            line = getattr(node, "lineno", 0)
            for rule, message in self._of(node):
                yield Finding(line, rule, message)

    def _of(self, node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.Attribute):
            yield from self._of_member(node)
        if isinstance(node, ast.Tuple | ast.Call):
            yield from self._of_signal(node)
        if isinstance(node, ast.Call):
            yield from self._of_call(node)
        elif isinstance(node, ast.Attribute):
            yield from self._of_attribute(node)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            yield from self._of_assignment(node)
        elif isinstance(node, ast.ClassDef):
            yield from self._of_class(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            for name in names:
                if name.partition(".")[0] in self.forbidden:
                    yield 7, f"imports {name}, which does not belong into Slicer's process"

    def _of_member(self, node: ast.Attribute) -> Iterator[tuple[int, str]]:
        """Compare a member of something of the table's classes with the table."""
        cls, name, parent = self.real_class(node.value), node.attr, self.parents.get(node)
        call = parent if isinstance(parent, ast.Call) and parent.func is node else None
        if cls is None:
            if call is not None and name in plain_setters() and name not in self.own:
                yield 1, f"{dotted(node)}(): Python cannot call it; write the property as an attribute"
            return
        for version in facts.VERSIONS:
            reach = facts.reach(cls, version)
            names, properties, _signals = of_qt(reach.qt_base)
            if isinstance(node.ctx, ast.Store):
                if not reach.properties.get(name, name in properties):
                    yield 2, f"{dotted(node)} = ...: {cls} has no such property to write in Slicer {version}"
            elif call is None:
                if not (name in reach.properties or name in reach.methods or name in reach.signals or name in names):
                    yield 1, f"{dotted(node)}: {cls} has it not in Slicer {version}, or Python cannot reach it"
            elif name in reach.methods:
                spread = call.keywords or any(isinstance(each, ast.Starred) for each in call.args)
                if not spread and not reach.takes(name, len(call.args)):
                    taken = " or ".join(f"({each})" for each in reach.methods[name])
                    yield 1, f"{dotted(node)}(): {cls} takes {taken} in Slicer {version}"
            elif name in reach.properties or (name in properties and name not in {"parent"}):
                yield 1, f"{dotted(node)}(): a property is read and written as an attribute"
            elif name not in names:
                yield 1, f"{dotted(node)}(): Python cannot call that of a {cls} in Slicer {version}"

    def _of_signal(self, node: ast.Tuple | ast.Call) -> Iterator[tuple[int, str]]:
        """``widget.connect("signal(...)", f)``, and tuples that begin with a widget and a signal."""
        if isinstance(node, ast.Tuple):
            sender, signal = (node.elts[0], node.elts[1]) if len(node.elts) > 1 else (None, None)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in {"connect", "disconnect"} and node.args:
            sender, signal = node.func.value, node.args[0]
        else:
            return
        cls = self.real_class(sender) if sender is not None else None
        if cls is None or not isinstance(signal, ast.Constant) or not isinstance(signal.value, str):
            return
        for version in facts.VERSIONS:
            if not is_signal(cls, signal.value, version):
                yield 3, f"{signal.value}: {cls} has no such signal in Slicer {version}"

    def _of_call(self, node: ast.Call) -> Iterator[tuple[int, str]]:
        function, name = node.func, dotted(node.func)
        method = function.attr if isinstance(function, ast.Attribute) else ""
        receiver = dotted(function.value) if isinstance(function, ast.Attribute) else ""
        if method in PROPERTIES - self.own and not node.args and not node.keywords and not _has_methods(receiver):
            yield 1, f"{name or method}(): a property is read as an attribute"
        if method in {"connect", "disconnect"} and node.args:
            yield from self._of_connection(node)
        if is_qt_constructor(node):
            if node.keywords:
                yield 6, f"{name}: PythonQt's constructors take no keyword arguments"
            if name.rpartition(".")[2] in _NEEDS_PARENT and not node.args:
                yield 6, f"{name}() needs a parent"
            if isinstance(self.parents.get(node), ast.Expr):
                yield 6, f"{name}(...) is lost at once: keep a reference"
            if name == "qt.QShortcut" and not self._names_context(node):
                yield 9, "a shortcut needs setContext(qt.Qt.WidgetWithChildrenShortcut)"
        if self.is_widget(function.value if isinstance(function, ast.Attribute) else function) or is_qt_constructor(node):
            for value in node.args:
                if re.fullmatch(r"(pathlib\.)?(Pure)?Path\(\)|(np|numpy)\.\w+\(\)", dotted(value)):
                    yield 5, f"{dotted(value)} goes into Qt: make it a str, an int or a float first"
        if method in _READS:
            outer = self.parents.get(node)
            if not (isinstance(outer, ast.Attribute) and outer.attr == "data"):
                yield 5, f"{method}(): read bytes as bytes(process.{method}().data())"
        if method == "exec" and isinstance(function, ast.Attribute):
            yield 8, "exec() is exec_() in PythonQt"

    def _of_connection(self, node: ast.Call) -> Iterator[tuple[int, str]]:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str) and not re.fullmatch(r"\w+\(.*\)", first.value):
            yield 3, f"connect('{first.value}') needs the whole signature"
        for value in node.args:
            if isinstance(value, ast.Lambda) and (value.args.defaults or value.args.kw_defaults):
                yield 3, "a lambda with default arguments receives the signal's arguments in them"
            if dotted(value) in {"functools.partial()", "partial()"}:
                yield 3, "functools.partial cannot be connected"

    def _of_attribute(self, node: ast.Attribute) -> Iterator[tuple[int, str]]:
        name = dotted(node)
        if isinstance(self.parents.get(node), ast.Attribute):
            inner = re.match(r"(qt|ctk)\.(\w+)\.([A-Z]\w*)$", name)
            outer = self.parents[node]
            if inner and isinstance(outer, ast.Attribute) and re.match(r"[A-Z]", outer.attr):
                yield 4, f"{name}.{outer.attr}: enumerations are unscoped ({inner[1]}.{inner[2]}.{outer.attr})"
        if node.attr == "value" and re.match(r"(qt|ctk)\.\w+\.[A-Z]", name):
            yield 4, f"{name}: compare enumerations by name, not by value"
        if (
            node.attr == "value"
            and isinstance(node.value, ast.Call)
            and dotted(node.value).endswith((".state()", ".error()"))
        ):
            yield 4, f"{name}: compare enumerations by name, not by value"
        if name in {"qt.Signal", "qt.Slot", "qt.Property", "qt.pyqtSignal"}:
            yield 7, f"{name} does not exist in PythonQt: write a signal in plain Python"
        if name.startswith(("qt.QThread", "qt.QRunnable", "qt.QtConcurrent")):
            yield 7, f"{name}: no threads of Qt's"
        if isinstance(node.value, ast.Call) and dotted(node.value).endswith(("layoutManager()", "mainWindow()")):
            yield 8, f"{dotted(node.value)} may be None"
        if name.endswith((".ApplicationShortcut", ".WindowShortcut")):
            yield 9, f"{name}: shortcuts are qt.Qt.WidgetWithChildrenShortcut"

    def _of_assignment(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> Iterator[tuple[int, str]]:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if (
                isinstance(target, ast.Attribute)
                and self.is_widget(target.value)
                and self.real_class(target.value) is None
                and target.attr not in PROPERTIES
            ):
                yield 2, f"{dotted(target)} = ...: keep your own state in your own classes"

    def _of_class(self, node: ast.ClassDef) -> Iterator[tuple[int, str]]:
        for base in node.bases:
            if re.fullmatch(r"qt\.Q\w*(Model|Delegate)", dotted(base)):
                yield 7, f"class {node.name}({dotted(base)}): no subclasses of models, use a QTableWidget"
        methods = {dotted(each.func).rpartition(".")[2] for each in ast.walk(node) if isinstance(each, ast.Call)}
        if "AddObserver" in methods and not methods & {"RemoveObserver", "RemoveObservers"}:
            yield 8, f"class {node.name} adds observers and never removes them"
        if "addObserver" in methods and not methods & {"removeObserver", "removeObservers"}:
            yield 8, f"class {node.name} adds observers and never removes them"

    def _names_context(self, node: ast.Call) -> bool:
        """Whether the function that makes a shortcut also sets its context."""
        scope: ast.AST = node
        while scope in self.parents and not isinstance(scope, ast.FunctionDef):
            scope = self.parents[scope]
        return any(
            isinstance(each, ast.Call)
            and dotted(each.func).endswith(".setContext")
            and any(dotted(value) == "qt.Qt.WidgetWithChildrenShortcut" for value in each.args)
            for each in ast.walk(scope)
        )


def is_signal(cls: str, signature: str, version: str) -> bool:
    """Whether the class of the table, or what it derives from in Qt, has the signal."""
    name, _, arguments = signature.removesuffix(")").partition("(")
    reach = facts.reach(cls, version)
    return arguments in reach.signals.get(name, ()) or signature in of_qt(reach.qt_base)[2]


def ui_findings(path: Path) -> list[str]:
    """What a ``.ui`` file wants of widgets of CTK and Slicer that they have not, in words."""
    root = ET.parse(path).getroot()
    classes = {str(widget.get("name")): str(widget.get("class")) for widget in root.iter("widget")}
    wanted: list[str] = []
    for version in facts.VERSIONS:
        for widget in root.iter("widget"):
            cls = str(widget.get("class"))
            if cls not in facts.table():
                if cls.startswith(("ctk", "qMRML", "qSlicer")):
                    wanted.append(f"{cls} is not in the table")
                continue
            reach = facts.reach(cls, version)
            for each in widget.findall("property"):
                name = str(each.get("name"))
                known = reach.properties.get(name, name in of_qt(reach.qt_base)[1])
                if not known and each.get("stdset") != "0":
                    wanted.append(f"{widget.get('name')}.{name}: {cls} has no such property to write in Slicer {version}")
        for connection in root.iter("connection"):
            sender, signal, receiver, slot = (
                connection.findtext(each, "") for each in ("sender", "signal", "receiver", "slot")
            )
            cls = classes[sender]
            if cls in facts.table() and not is_signal(cls, signal, version):
                wanted.append(f"{sender}: {cls} has no signal {signal} in Slicer {version}")
            cls, name = classes[receiver], slot.partition("(")[0]
            if cls in facts.table():
                reach = facts.reach(cls, version)
                if name not in reach.methods and name not in of_qt(reach.qt_base)[0]:
                    wanted.append(f"{receiver}: {cls} has no slot {slot} in Slicer {version}")
    return sorted(set(wanted))


def _has_methods(receiver: str) -> bool:
    """Whether what is called is an item of a table or list, a static function of a class, or the base class."""
    return "item" in receiver.lower() or receiver.startswith("qt.") or receiver == "super()"


def findings(source: str, held: Mapping[str, str] = {}, forbidden: Collection[str] = ()) -> list[Finding]:
    """Every breach in a file's text, from top to bottom.

    Args:
        held: the classes of what names of the code hold, where the text alone does not say it: those of ``widget_classes``,
            and for example ``{"editor_widget": "qMRMLSegmentEditorWidget"}``.
        forbidden: packages that must not be imported, beside other ways to Qt.

    Raises:
        SyntaxError: the text is no Python.
    """
    return sorted(set(Rules(source, held, forbidden).findings()), key=lambda each: (each.line, each.rule, each.message))


def main(arguments: Sequence[str] | None = None) -> int:
    """List the breaches in files and folders; the exit code is 1 where there are any."""
    parser = argparse.ArgumentParser(description="Find what code for Slicer's Python (PythonQt) must not do.")
    parser.add_argument("paths", nargs="+", type=Path, help=".py and .ui files, and folders of them")
    parser.add_argument("--held", nargs="*", default=[], metavar="NAME=CLASS", help="what a name of the code holds")
    parser.add_argument("--forbid", nargs="*", default=[], metavar="PACKAGE", help="packages that must not be imported")
    given = parser.parse_args(arguments)
    files = [file for path in given.paths for file in ([path] if path.is_file() else sorted(path.rglob("*.*")))]
    ui_files = [file for file in files if file.suffix == ".ui"]
    held = {**widget_classes(ui_files), **dict(each.split("=", 1) for each in given.held)}
    found = [
        f"{file}:{each.line}: rule {each.rule}: {each.message}"
        for file in files
        if file.suffix == ".py"
        for each in findings(file.read_text(encoding="utf-8"), held, given.forbid)
    ]
    found += [f"{file}: {each}" for file in ui_files for each in ui_findings(file)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

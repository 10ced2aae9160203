"""``object.connect("signal(args)", callable)`` and its ``disconnect``, as PythonQt has them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from PySide6 import QtCore

from . import facts

_qobject_connect = QtCore.QObject.connect
_qobject_disconnect = QtCore.QObject.disconnect

# Which callable is connected to which signal of which object: the key is the object, the entries are
# (normalised signature, callable, forwarding function, bound signal).
_Entry = tuple[str, Callable[..., Any], Callable[..., Any], Any]
_connections: weakref.WeakKeyDictionary[Any, list[_Entry]] = weakref.WeakKeyDictionary()


def normalised(signature: str) -> str:
    """``signature`` without spaces, ``const`` and references, as Qt's meta object writes it."""
    return bytes(QtCore.QMetaObject.normalizedSignature(signature).data()).decode()


def signal_name(signature: str) -> str:
    """``"clicked(bool)"`` gives ``"clicked"``."""
    return signature.partition("(")[0].strip()


def _argument_count(signature: str) -> int:
    inner = signature[signature.index("(") + 1 : signature.rindex(")")].strip()
    return len(inner.split(",")) if inner else 0


def _positional_arity(callback: Callable[..., Any]) -> int | None:
    """How many positional arguments ``callback`` takes; None: any number."""
    function = callback.__func__ if inspect.ismethod(callback) else callback
    if not inspect.isfunction(function) or function.__code__.co_flags & inspect.CO_VARARGS:
        return None
    return function.__code__.co_argcount - (1 if inspect.ismethod(callback) else 0)


def _forwarder(callback: Callable[..., Any], count: int, convert: Callable[[Any], Any] | None) -> Callable[..., Any]:
    """A function of exactly ``count`` arguments, because PySide6 decides by the number of them which signal it means."""
    if count == 0:
        return lambda: callback()
    if count == 1:
        return lambda first: callback(first if convert is None else convert(first))
    if count == 2:
        return lambda first, second: callback(first, second)
    if count == 3:
        return lambda first, second, third: callback(first, second, third)
    return lambda *values: callback(*values)


def _bound_signal(sender: Any, signature: str) -> tuple[Any, Callable[[Any], Any] | None]:
    """The signal of ``sender`` that ``signature`` means and what turns its value into the declared one.

    Raises:
        ValueError: there is no such signal.
    """
    name, arguments = signal_name(signature), signature.partition("(")[2].removesuffix(")")
    stand_in = next((cls for cls in type(sender).__mro__ if vars(cls).get("stand_in")), None)
    declared = facts.of(stand_in.__name__).signals if stand_in is not None else {}
    if arguments in declared.get(name, ()):
        return getattr(sender, name), getattr(sender, "_conversions", {}).get(signature)
    if name in declared or sender.metaObject().indexOfSignal(signature) < 0:
        raise ValueError(f"QObject::connect: no signal '{signature}' in {type(sender).__name__}")
    return getattr(sender, signal_name(signature)), None


def connect(self: Any, *arguments: Any) -> Any:
    """``self.connect("clicked()", f)``: call ``f`` with at most as many arguments as it takes.

    Raises:
        ValueError: the text is no full signature, or the object has no such signal.
        TypeError: what is to be called cannot be called.
    """
    if not arguments or not isinstance(arguments[0], str):
        return _qobject_connect(*arguments) if _qt_calls_itself(arguments) else _qobject_connect(self, *arguments)
    if len(arguments) < 2 or not callable(arguments[1]):
        raise TypeError(f"connect('{arguments[0]}', ...) needs something that can be called")
    if "(" not in arguments[0]:
        raise ValueError(f"connect('{arguments[0]}') needs the whole signature, for example 'clicked()'")
    signature, callback = normalised(arguments[0]), arguments[1]
    bound, convert = _bound_signal(self, signature)
    given, wanted = _argument_count(signature), _positional_arity(callback)
    forward = _forwarder(callback, given if wanted is None else min(given, wanted), convert)
    bound.connect(forward)
    _connections.setdefault(self, []).append((signature, callback, forward, bound))
    return True


def disconnect(self: Any, *arguments: Any) -> Any:
    """``self.disconnect("clicked()", f)``; False where they are not connected."""
    if not arguments or not isinstance(arguments[0], str):
        return _qobject_disconnect(*arguments) if _qt_calls_itself(arguments) else _qobject_disconnect(self, *arguments)
    signature = normalised(arguments[0])
    entries = _connections.get(self, [])
    for entry in entries:
        if entry[0] == signature and (len(arguments) < 2 or entry[1] == arguments[1]):
            entry[3].disconnect(entry[2])
            entries.remove(entry)
            return True
    return False


def _qt_calls_itself(arguments: tuple[Any, ...]) -> bool:
    """PySide6's own ``signal.connect`` comes back here with the sender as first argument."""
    return bool(arguments) and isinstance(arguments[0], QtCore.QObject)

"""Replace attributes of mlx-lm's modules, and put every one of them back.

A name can be imported
elsewhere (``from .models.cache import make_prompt_cache``), so a wrapper may
outlive :func:`undo` in modules that imported it: each wrapper therefore asks
:func:`active` first and is a plain call of the original once patches are undone.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import wrapt

_replaced: list[tuple[Any, str, Any, Any]] = []
_active = False


def activate() -> None:
    """Let the wrappers act."""
    global _active
    _active = True


def active() -> bool:
    """True between :func:`activate` and :func:`undo`."""
    return _active


def replaced() -> list[str]:
    """Dotted names of what is replaced now, in the order of replacement."""
    return [f"{_name(owner)}.{name}" for owner, name, _, _ in _replaced]


def places_of(method: Callable) -> dict[str, int]:
    """The place of each parameter of a method among those after ``self``."""
    _, *names = inspect.signature(method).parameters
    return {name: place for place, name in enumerate(names)}


def argument(
    name: str, places: Mapping[str, int], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The argument ``name`` of a wrapped call, given by its name or by its place; else None.

    Args:
        places: of the parameters.
    """
    if name in kwargs:
        return kwargs[name]
    place = places.get(name, len(args))
    return args[place] if place < len(args) else None


def wrap(owner: Any, name: str, wrapper: Callable) -> None:
    """Wrap the function ``owner.name`` (a module's or a class's) with a wrapt wrapper.

    If the module defines the function, the modules that imported it follow; a name that the
    module has imported is replaced there alone.

    Args:
        owner: a module or a class.
        name: the attribute; wrapping it again does nothing.
        wrapper: ``wrapper(wrapped, instance, args, kwargs)``; called only while
            patches are active.

    Raises:
        AttributeError: ``owner`` has no such attribute.
    """
    if any(o is owner and n == name for o, n, _, _ in _replaced):
        return
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    wrapped = wrapt.FunctionWrapper(original, wrapper, enabled=active)
    setattr(owner, name, wrapped)
    _replaced.append((owner, name, original, wrapped))
    if _defines(owner, original):
        _rebind(original, wrapped, name)


def undo() -> None:
    """Put every original back and make the wrappers inert."""
    global _active
    _active = False
    rollback(0)


def rollback(count: int) -> None:
    """Put back what was replaced after the first ``count`` names of :func:`replaced`."""
    while len(_replaced) > count:
        owner, name, original, wrapped = _replaced.pop()
        if owner.__dict__.get(name) is wrapped:
            setattr(owner, name, original)
        if _defines(owner, original):
            _rebind(wrapped, original, name)


def _defines(owner: Any, function: Any) -> bool:
    """Whether others import ``function`` from ``owner``, which did not import it itself."""
    return not isinstance(owner, type) and function.__module__ == owner.__name__


def _rebind(old: Any, new: Any, name: str) -> None:
    """Follow ``from module import name`` in the modules loaded already, scripts included."""
    for module in list(sys.modules.values()):
        try:
            # Plain getattr() would load the modules that are only loaded when looked into.
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:  # anything can stand in sys.modules
            continue
        if names.get(name) is old:
            names[name] = new


def _name(owner: Any) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return owner.__name__

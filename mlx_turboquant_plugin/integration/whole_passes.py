"""A pass that ends in the middle of a model leaves layers that hold different tokens.

Ctrl-C does so, or memory that runs out. mlx-lm's own caches go on from there with wrong
results; compressed ones are refused until they are trimmed alike.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.nn as nn

from .. import patching
from ..cache import BatchCompressedKVCache, CompressedKVCache
from ..cache.parts import parts_of
from ..cache.reading import AttendedCache
from .calibration import same_objects
from .projections import entries

Compressed = CompressedKVCache | BatchCompressedKVCache


def guard_all(model: Any) -> None:
    """:func:`guard` a model and the parts that run its layers: programs call these, too."""
    for kind in {type(model), *map(type, _with_layers(model))}:
        guard(kind)


def _with_layers(holder: Any, is_layers: bool = False) -> Iterator[nn.Module]:
    """The modules below a module that have layers themselves.

    Whoever makes a prompt cache waits for it, so layers are not looked into but for such modules.

    Args:
        is_layers: whether ``holder`` is a list of layers.
    """
    for name, value in entries(holder):
        if isinstance(value, nn.Module) and _has_layers(value):
            yield value
            yield from _with_layers(value)
        elif isinstance(value, (dict, list)) and not is_layers:
            yield from _with_layers(value, name == "layers" and isinstance(value, list))


def _has_layers(module: nn.Module) -> bool:
    # Not hasattr(), which raises and catches an exception for each that has none.
    return "layers" in module or hasattr(type(module), "layers")


def guard(model: type) -> None:
    """Have models of this class refuse compressed caches that an earlier pass left uneven."""
    owner = next((kind for kind in model.__mro__ if "__call__" in vars(kind)), None)
    if owner is None:
        return
    places = patching.places_of(owner.__call__)
    if "cache" in places:
        patching.wrap(owner, "__call__", functools.partial(_model_call, places))


def _model_call(places, wrapped, instance, args, kwargs):
    caches = patching.argument("cache", places, args, kwargs)
    parts = list(parts_of(caches if isinstance(caches, (list, tuple)) else ()))
    ours: list[Any] = [one for one in parts if isinstance(one, AttendedCache)]
    if not ours:
        return wrapped(*args, **kwargs)
    _check(ours)
    before = None if len(ours) == len(parts) else _content(parts)
    try:
        out = wrapped(*args, **kwargs)
    except BaseException:
        for one in ours:
            one.passed = None
        if before is not None and not same_objects(_content(parts), before):
            # Nobody can tell what a recurrent state has seen of the pass, or undo it.
            for one in ours:
                one.interrupted = True
        raise
    for one in ours:
        one.end_pass()
    return out


def _content(caches: Sequence[Any]) -> tuple[Any, ...]:
    """Objects that are other ones once a cache has seen tokens."""
    found: list[Any] = []
    for cache in caches:
        if isinstance(cache, AttendedCache):
            found.append(_length(cache))
            continue
        # Keys and values may be written into, but then something is counted.
        for value in getattr(cache, "__dict__", {}).values():
            found.extend(value if isinstance(value, list) else [value])
    return tuple(found)


def _length(cache: Any) -> int:
    return cache.offset if isinstance(cache, CompressedKVCache) else cache.size()


def _check(caches: Sequence[Compressed]) -> None:
    caches[0].check_whole()
    held = set(map(_length, caches))
    if len(held) > 1:
        raise RuntimeError(
            f"the layers of this prompt cache hold from {min(held)} to {max(held)} tokens, since a "
            f"pass over it was interrupted: trim each to {min(held)}, or make the prompt cache "
            "again"
        )

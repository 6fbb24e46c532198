"""The caches of a layer: mlx-lm's CacheList holds several, and other lists among them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlx_lm.models.cache import CacheList

from .compressed import CompressedKVCache


def parts(cache: Any) -> Iterator[Any]:
    """Those that ``cache`` holds, however deep, in their order; or it alone."""
    return parts_of((cache,))


def parts_of(caches: Iterable[Any]) -> Iterator[Any]:
    """The :func:`parts` of each layer's cache."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from parts_of(cache.caches)
        else:
            yield cache


def rebuilt(cache: Any, make: Callable[[Any], Any]) -> Any:
    """``cache`` with ``make(part)`` in the place of each of its :func:`parts`."""
    if isinstance(cache, CacheList):
        return CacheList(*(rebuilt(one, make) for one in cache.caches))
    return make(cache)


def only_compressed(caches: Iterable[Any]) -> list[CompressedKVCache]:
    """The compressed ones of single sequences among the parts of each layer's cache."""
    return [one for one in parts_of(caches) if isinstance(one, CompressedKVCache)]

"""What the caches of a model take at any length, counted without running it."""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import CompressedKVCache
from ..cache.parts import parts_of, rebuilt
from ..cache.sizes import CacheSize, cache_size, holds_keys

# After so many tokens caches are looked at that are no keys and values. One less than a power of
# two: a group of such a size, which is pooled once it is full, is as full as it gets.
LENGTHS = [2**power - 1 for power in range(9, 18)]


def uncompressed(caches: Sequence[Any]) -> list[Any]:
    """mlx-lm's own caches in the place of ``caches``, which are empty."""
    return [rebuilt(cache, _own) for cache in caches]


def _own(cache: Any) -> Any:
    return cache.to_exact() if isinstance(cache, CompressedKVCache) else copy.deepcopy(cache)


class Sizes:
    """The bytes of prompt caches of a model.

    Args:
        model: no weight of it is evaluated.
        caches: any prompt cache for it, empty.
    """

    def __init__(self, model: nn.Module, caches: Sequence[Any]):
        self._used = _after(model, caches, 1)
        self._points = [[(1, one.nbytes)] for one in self._used]
        others = [place for place, one in enumerate(self._used) if not holds_keys(one)]
        for length in LENGTHS if others else ():
            after = _after(model, caches, length)
            grown = [place for place in others if after[place].nbytes > self._points[place][-1][1]]
            for place in others:
                self._points[place].append((length, after[place].nbytes))
            if not grown:
                break

    def of(self, caches: Sequence[Any]) -> list[CacheSize]:
        """Those of ``caches``, which are empty, the caches of each layer after the other."""
        known = zip(parts_of(caches), self._used, self._points, strict=True)
        return [cache_size(*each) for each in known]

    def at(self, caches: Sequence[Any], count: int) -> int:
        """``nbytes`` of all of ``caches`` once they hold ``count`` tokens."""
        return sum(size.at(count) for size in self.of(caches))


def _after(model: nn.Module, caches: Sequence[Any], count: int) -> list[Any]:
    """Own caches after ``count`` tokens, of which nothing but shapes and dtypes is known."""
    used = uncompressed(caches)
    model(mx.zeros((1, count), mx.int32), cache=used)
    return list(parts_of(used))

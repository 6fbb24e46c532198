"""What the caches of a model take at any length, counted without running it."""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import CompressedKVCache
from ..cache.parts import rebuilt
from ..cache.sizes import bytes_at


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
        self._used = uncompressed(caches)
        # Shapes and dtypes are known without evaluating it.
        model(mx.zeros((1, 1), mx.int32), cache=self._used)

    def at(self, caches: Sequence[Any], count: int) -> int:
        """``nbytes`` of all of ``caches``, which are empty, once they hold ``count`` tokens."""
        return sum(
            bytes_at(cache, used, count) for cache, used in zip(caches, self._used, strict=True)
        )

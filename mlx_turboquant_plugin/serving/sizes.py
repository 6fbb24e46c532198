"""The bytes that running sequences may come to, and those that caches would take uncompressed."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as cache_module

from ..cache import BatchCompressedKVCache, BatchedRows, CompressedKVCache
from ..cache.parts import parts_of
from ..cache.sizes import CacheSize, Row
from ..integration.sizes import Sizes


class Footprint:
    """What rows of a model take in all its caches.

    Args:
        models: the model and, if it has one, the draft model whose caches go with its own.
        chunk: how many tokens of a prompt are processed at once.
    """

    def __init__(self, models: Iterable[nn.Module], chunk: int):
        self._chunk = chunk
        self._sizes: Counter[CacheSize] = Counter()
        for model in models:
            caches = cache_module.make_prompt_cache(model)
            self._sizes.update(Sizes(model, caches).of(caches))
        self.row = functools.lru_cache(maxsize=256)(self._row)

    def _row(self, row: Row) -> int:
        """The most bytes that a row ever takes."""
        return sum(count * size.most(row, self._chunk) for size, count in self._sizes.items())

    def batch(self, rows: Sequence[Row]) -> int:
        """The most bytes that rows ever take together: each as many as the longest would.

        Rows that are decoded together stand side by side in the same arrays.
        """
        if not rows:
            return 0
        prompts, most = zip(*rows)
        return len(rows) * self.row(Row(max(prompts), max(most)))


def uncompressed_nbytes(caches: Iterable[Any]) -> int:
    """The bytes that the tokens of ``caches`` would take in the model's dtype."""
    return sum(map(_uncompressed, parts_of(caches)))


def _uncompressed(cache: Any) -> int:
    if isinstance(cache, BatchCompressedKVCache):
        return sum(map(_uncompressed, cache.holders[1:]))
    if isinstance(cache, CompressedKVCache):
        held, tokens = cache.full_tokens, cache.size()
    elif isinstance(cache, BatchedRows):
        held, tokens = cache.full_tokens, sum(cache.lengths) // len(cache.lengths)
    else:
        return cache.nbytes
    return int(held.nbytes / held.count * tokens) if held.count else 0

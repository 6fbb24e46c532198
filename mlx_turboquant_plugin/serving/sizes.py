"""The bytes of caches before they are filled: by shapes and dtypes, nothing is computed."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as cache_module

from ..cache import BatchCompressedKVCache, CompressedKVCache, PackedRows
from ..cache.compressed import AHEAD
from ..cache.sizes import code_bytes
from ..cache.visibility import BLOCK, Ring, Visibility


class Row(NamedTuple):
    """One sequence of a batch, in tokens.

    Attributes:
        prompt: those of its prompt, which may be found in a longer cache and cut to it.
        most: as many as its cache may hold.
    """

    prompt: int
    most: int


class LayerSize(Protocol):
    def nbytes(self, row: Row) -> int:
        """The most bytes that one layer's cache ever takes for a row."""


@dataclass(frozen=True)
class CompressedSize:
    """A compressed cache.

    Args:
        exact_token, coded_token: the bytes of one.
        visibility, ring: see :class:`CompressedKVCache`.
    """

    exact_token: int
    coded_token: int
    visibility: Visibility
    ring: Ring | None

    @classmethod
    def of(cls, cache: Any) -> "CompressedSize":
        """That of a CompressedKVCache that holds one token."""
        held = cache.exact_tokens
        coded = held.heads[1] * code_bytes(cache.codec.spec)
        return cls(held.nbytes, coded, cache.visibility, cache.ring)

    def nbytes(self, row: Row) -> int:
        visibility, ring = self.visibility, self.ring
        exact = visibility.sinks + visibility.most_exact
        # While rows are decoded together their codes are written before they are needed.
        first_exact = visibility.exact_from(row.most - 1)
        coded = min(row.most // BLOCK * BLOCK, first_exact + AHEAD)
        if first_exact <= visibility.sinks:
            coded = 0
        # A longer cache that is cut keeps the codes of all that is left.
        coded = max(coded, row.prompt - 1)
        if ring is not None:
            exact = min(exact, ring.max_size)
            coded = min(coded, ring.max_size + BLOCK)
        return min(exact, row.most) * self.exact_token + coded * self.coded_token


@dataclass(frozen=True)
class OwnSize:
    """A cache of mlx-lm's: what grows with the tokens, some spare room, and what does not grow.

    Args:
        token: the bytes of one.
        spare: for how many tokens there may be room that none has taken.
        limit: the most tokens that it keeps, or None.
        fixed: the bytes that are always there.
    """

    token: int = 0
    spare: int = 0
    limit: int | None = None
    fixed: int = 0

    @classmethod
    def of(cls, cache: Any, chunk: int) -> "OwnSize":
        """That of a cache that holds one token, and gets up to ``chunk`` at once."""
        keys = getattr(cache, "keys", None)
        if not isinstance(keys, mx.array) or keys.ndim != 4:
            return cls(fixed=cache.nbytes)
        limit = getattr(cache, "max_size", None)
        step = getattr(cache, "step", 1)
        return cls(cache.nbytes // keys.shape[2], step - 1, limit and limit + chunk)

    def nbytes(self, row: Row) -> int:
        tokens = row.most + self.spare
        return self.fixed + self.token * min(tokens, self.limit or tokens)


class Footprint:
    """What rows of a model take in all its caches.

    Args:
        models: the model and, if it has one, the draft model whose caches go with its own.
        chunk: how many tokens of a prompt are processed at once.
    """

    def __init__(self, models: Iterable[nn.Module], chunk: int):
        layers = (size for model in models for size in _sizes(model, chunk))
        self._layers: Counter[LayerSize] = Counter(layers)
        self.row = functools.lru_cache(maxsize=256)(self._row)

    def _row(self, row: Row) -> int:
        """The most bytes that a row ever takes."""
        return sum(count * size.nbytes(row) for size, count in self._layers.items())

    def batch(self, rows: Sequence[Row]) -> int:
        """The most bytes that rows ever take together: each as many as the longest would.

        Rows that are decoded together stand side by side in the same arrays.
        """
        if not rows:
            return 0
        prompts, most = zip(*rows)
        return len(rows) * self.row(Row(max(prompts), max(most)))


def _sizes(model: nn.Module, chunk: int) -> Iterator[LayerSize]:
    caches = cache_module.make_prompt_cache(model)
    # Nobody asks for the logits: no weight is read.
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    for cache in _parts(caches):
        if isinstance(cache, CompressedKVCache):
            yield CompressedSize.of(cache)
        else:
            yield OwnSize.of(cache, chunk)


def uncompressed_nbytes(caches: Iterable[Any]) -> int:
    """The bytes that the tokens of ``caches`` would take in the model's dtype."""
    return sum(map(_uncompressed, _parts(caches)))


def _uncompressed(cache: Any) -> int:
    if isinstance(cache, BatchCompressedKVCache):
        return sum(map(_uncompressed, cache.holders[1:]))
    if isinstance(cache, CompressedKVCache):
        held, tokens = cache.exact_tokens, cache.size()
    elif isinstance(cache, PackedRows):
        held, tokens = cache.exact_tokens, sum(cache.lengths) // len(cache.lengths)
    else:
        return cache.nbytes
    return int(held.nbytes / held.count * tokens) if held.count else 0


def _parts(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        yield from getattr(cache, "caches", [cache])

"""How many bytes caches will take, counted before they hold any token."""

import copy
import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache

from ..codecs.kv_codec import CodecSpec, KVCodec
from .compressed import CompressedKVCache
from .encoding import AHEAD
from .visibility import BLOCK, Ring, Visibility


class Row(NamedTuple):
    """One sequence of a batch, in tokens.

    Attributes:
        prompt: those of its prompt, which may be found in a longer cache and cut to it.
        most: as many as its cache may hold.
    """

    prompt: int
    most: int


class CacheSize(Protocol):
    """The bytes of one cache; of two that are equal the most is the same."""

    def at(self, count: int) -> int:
        """``nbytes`` once it holds ``count`` tokens of one sequence, the last one by itself."""

    def most(self, row: Row, chunk: int) -> int:
        """The most that it ever takes for a row that gets up to ``chunk`` tokens at once."""


def cache_size(cache: Any, used: Any, points: Sequence[tuple[int, int]]) -> CacheSize:
    """That of ``cache``, which is empty.

    Args:
        cache: compressed or not, but no list of caches.
        used: mlx-lm's own in its place, after one token: its arrays, which need not be evaluated,
            have the shapes and dtypes of this model.
        points: if it holds no keys, see :class:`MeasuredSize`.
    """
    if not holds_keys(used):
        return MeasuredSize(tuple(points))
    token = tuple((x[:, :, :1].shape, x.dtype) for x in (used.keys, used.values))
    if isinstance(cache, CompressedKVCache):
        (rows, heads, *_), _ = token[0]
        return CompressedSize(
            _nbytes(token),
            rows * heads * code_bytes(cache.codec.spec),
            cache.visibility,
            cache.ring,
            cache.backend.fixed_shapes,
        )
    size = getattr(cache, "max_size", None)
    return KeysSize(token, getattr(cache, "step", 1), size, copy.deepcopy(cache))


def holds_keys(used: Any) -> bool:
    """Whether a cache that holds a token has keys and values as mlx-lm's own: (B, H, T, D)."""
    keys = getattr(used, "keys", None)
    return isinstance(keys, mx.array) and keys.ndim == 4 and hasattr(used, "update_and_fetch")


@dataclass(frozen=True)
class CompressedSize:
    """A compressed cache.

    Args:
        full_token, quantized_token: the bytes of one.
        visibility, ring: see :class:`CompressedKVCache`.
        fixed_shapes: see :meth:`Visibility.retained_from`.
    """

    full_token: int
    quantized_token: int
    visibility: Visibility
    ring: Ring | None
    fixed_shapes: bool

    def at(self, count: int) -> int:
        full, quantized = self._held(count)
        return full * self.full_token + quantized * self.quantized_token

    def most(self, row: Row, chunk: int) -> int:
        full = self.visibility.sinks + self.visibility.most_full_tokens
        quantized = self._quantized(row.most)
        if quantized:
            # While rows are decoded together their codes are written before they are needed.
            quantized = min(row.most // BLOCK * BLOCK, quantized + AHEAD)
        # A longer cache that is cut keeps the codes of all that is left.
        quantized = max(quantized, row.prompt - 1)
        if self.ring is not None:
            full = min(full, self.ring.max_size)
            quantized = min(quantized, self.ring.max_size + BLOCK)
        return min(full, row.most) * self.full_token + quantized * self.quantized_token

    def _held(self, count: int) -> tuple[int, int]:
        """How many of ``count`` tokens are held in full precision, and how many as codes."""
        visibility, ring = self.visibility, self.ring
        sinks, first_quantized, quantized = min(visibility.sinks, count), 0, self._quantized(count)
        retained = visibility.retained_from(count, self.fixed_shapes)
        full_start = max(sinks, min(retained, quantized))
        if ring is not None:
            _, oldest = ring.oldest(count - 1, 0)
            full_start = max(full_start, oldest)
            first_quantized = min(oldest // BLOCK * BLOCK, quantized)
            if full_start > max(quantized, ring.keep):
                # They leave the ring before they need codes.
                first_quantized = quantized
        return sinks + count - full_start, quantized - first_quantized

    def _quantized(self, count: int) -> int:
        """The first of ``count`` positions that has no code."""
        first = self.visibility.full_from(count - 1)
        return first if first > self.visibility.sinks else 0


@dataclass(frozen=True)
class KeysSize:
    """A cache of mlx-lm's with keys and values, maybe with spare room.

    Args:
        token: shape and dtype of the keys and of the values of one.
        step: for how many more tokens room is made at once.
        limit: the most tokens that it keeps while steps are short, or None.
        empty: such a cache.
    """

    token: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    step: int
    limit: int | None
    empty: Any = field(compare=False)

    def at(self, count: int) -> int:
        filled = copy.deepcopy(self.empty)
        # The last by itself: with it a cache that forgets lets go of the rest of a prompt's chunk.
        for tokens in filter(None, (count - 1, 1)):
            if isinstance(filled, ChunkedKVCache):
                filled.maybe_trim_front()
            filled.update_and_fetch(
                *(mx.zeros((*shape[:2], tokens, shape[3]), dtype) for shape, dtype in self.token)
            )
        return filled.nbytes

    def most(self, row: Row, chunk: int) -> int:
        tokens = row.most + self.step - 1
        if self.limit:
            tokens = min(tokens, self.limit + chunk)
        return tokens * _nbytes(self.token)


@dataclass(frozen=True)
class MeasuredSize:
    """A cache of any other kind: a state, or one that grows in a way of its own.

    Args:
        points: two or more ascending numbers of tokens, and the bytes that it took with so many.
    """

    points: tuple[tuple[int, int], ...]

    def at(self, count: int) -> int:
        """See :class:`CacheSize`; it may be more where a window fills or a group is not full.

        Growth slows down if it changes at all, as windows do once they are full. So what is taken
        between two points is no more than the growth before them, or after them, would lead to.
        """
        stretches = list(itertools.pairwise(self.points))
        place = max(bisect_left(self.points, (count,)) - 1, 0)
        if place == len(stretches):
            return _line(stretches[-1], count)
        around = (*stretches[max(place - 1, 0) : place], *stretches[place + 1 : place + 2])
        between = _line(stretches[place], count)
        return max(between, min((_line(one, count) for one in around), default=between))

    def most(self, row: Row, chunk: int) -> int:
        # What waits for more tokens to be pooled with has been a part of the first ones.
        (_, first), (_, second), *_ = self.points
        return self.at(row.most) + second - first


def _line(points: tuple[tuple[int, int], tuple[int, int]], count: int) -> int:
    """Where the line through two points is at ``count``, rounded up."""
    (start, low), (end, high) = points
    return low - (low - high) * (count - start) // (end - start)


def _nbytes(token: Sequence[tuple[tuple[int, ...], mx.Dtype]]) -> int:
    return sum(math.prod(shape) * dtype.size for shape, dtype in token)


@functools.cache
def code_bytes(spec: CodecSpec) -> int:
    """Bytes of the codes of one token, key and value, in one head."""
    keys, values = (mx.zeros((1, 1, BLOCK, dim)) for dim in spec.dims)
    # Made as ever, and never evaluated: the shapes say it.
    codes = KVCodec(spec).encode(keys, values, 0)
    return sum(plane.nbytes for planes in codes for plane in planes) // BLOCK

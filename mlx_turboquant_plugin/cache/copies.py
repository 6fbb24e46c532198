"""Copies of caches, which share their arrays, and pickles, which hold what files hold."""

from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from ..backends import backend
from ..per_thread import release
from .full_precision import FullPrecisionTokens
from .visibility import Visibility

if TYPE_CHECKING:
    from .batch import BatchCompressedKVCache
    from .compressed import CompressedKVCache

Cache = TypeVar("Cache")


def shared(cache: Cache) -> Cache:
    """Another cache with the same attributes: arrays are never written into."""
    other = object.__new__(type(cache))
    other.__dict__.update(cache.__dict__)
    return other


def detached(cache: "CompressedKVCache") -> "CompressedKVCache":
    """The same cache in arrays of its own, not parts of larger ones."""
    other = shared(cache)
    if not cache.empty():
        held = cache.full_tokens
        other.full_tokens = FullPrecisionTokens(_own(held.keys), _own(held.values))
        other.key_codes = tuple(map(_own, cache.key_codes))
        other.value_codes = tuple(map(_own, cache.value_codes))
        release(other.arrays)
    return other


def unpickled(kind: Any, state: tuple, visibility: Visibility, kernel: str) -> "CompressedKVCache":
    """A cache of ``kind`` as it was pickled, but for the layer that it served.

    The model makes itself known to it again, as to one from a file.
    """
    cache = kind.from_state(state)
    cache.visibility, cache.backend = visibility, backend(kernel)
    return cache


def unpickled_batch(kind: type, rows: list[Any], *place: Any) -> "BatchCompressedKVCache":
    """A batch of ``kind`` as it was pickled."""
    batch = kind([0] * len(rows))
    batch._rows = rows
    batch._index, batch._left_padding, batch._lengths = place
    return batch


def _own(array: mx.array) -> mx.array:
    # Unlike mx.contiguous(), concatenate() always makes a new array.
    return mx.concatenate([array[:, :, :1], array[:, :, 1:]], axis=2)

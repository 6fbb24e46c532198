"""How many bytes caches will take, counted before they hold any token."""

import copy
import functools
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, ChunkedKVCache

from ..codecs.kv_codec import CodecSpec, KVCodec
from .compressed import CompressedKVCache
from .visibility import BLOCK


def bytes_at(cache: Any, used: Any, count: int) -> int:
    """``nbytes`` of ``cache``, which is empty, once it holds ``count`` tokens of one sequence.

    Args:
        cache: that of one layer, compressed or not.
        used: mlx-lm's own cache of that layer after one token: its arrays, which need not be
            evaluated, have the shapes and dtypes of this model.
    """
    if isinstance(used, CacheList):
        return sum(bytes_at(*each, count) for each in zip(cache.caches, used.caches, strict=True))
    keys, values = (getattr(used, name, None) for name in ("keys", "values"))
    if not isinstance(keys, mx.array):
        # A state, which does not grow.
        return used.nbytes
    keys, values = keys[:, :, :1], values[:, :, :1]
    if isinstance(cache, CompressedKVCache):
        exact, coded = tokens_held(cache, count)
        codes = keys.shape[0] * keys.shape[1] * code_bytes(cache.codec.spec)
        return exact * (keys.nbytes + values.nbytes) + coded * codes
    filled = copy.deepcopy(cache)
    # The last one by itself: with it a cache that forgets lets go of the rest of a prompt's chunk.
    for tokens in filter(None, (count - 1, 1)):
        if isinstance(filled, ChunkedKVCache):
            filled.maybe_trim_front()
        filled.update_and_fetch(
            *(mx.broadcast_to(x, (*x.shape[:2], tokens, x.shape[3])) for x in (keys, values))
        )
    return filled.nbytes


def tokens_held(cache: CompressedKVCache, count: int) -> tuple[int, int]:
    """How many of ``count`` tokens ``cache`` will hold exactly, and how many as codes."""
    visibility, ring = cache.visibility, cache.ring
    sinks, first_coded = min(visibility.sinks, count), 0
    coded = visibility.exact_from(count - 1)
    if coded <= visibility.sinks:
        coded = 0
    retained = visibility.retained_from(count, cache.backend.fixed_shapes)
    exact_start = max(sinks, min(retained, coded))
    if ring is not None:
        _, oldest = ring.oldest(count - 1, 0)
        exact_start = max(exact_start, oldest)
        first_coded = min(oldest // BLOCK * BLOCK, coded)
        if exact_start > max(coded, ring.keep):
            # They leave the ring before they need codes.
            first_coded = coded
    return sinks + count - exact_start, coded - first_coded


@functools.cache
def code_bytes(spec: CodecSpec) -> int:
    """Bytes of the codes of one token, key and value, in one head."""
    keys, values = (mx.zeros((1, 1, BLOCK, dim)) for dim in spec.dims)
    # Made as ever, and never evaluated: the shapes say it.
    codes = KVCodec(spec).encode(keys, values, 0)
    return sum(plane.nbytes for planes in codes for plane in planes) // BLOCK

"""mlx-lm's own caches in a batch of compressed ones: nothing of them is quantized."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from ..codecs.kv_codec import CodecSpec, KVCodec
from ..per_thread import release
from .compressed import CompressedKVCache
from .copies import detached, shared
from .full_precision import FullPrecisionTokens
from .rotating import RotatingCompressedKVCache
from .visibility import ENDLESS, Visibility


def row_of(cache: Any) -> CompressedKVCache:
    """The row of a batch that goes on where a single ``cache`` is.

    Raises:
        TypeError: the cache is of another kind than the compressed ones, KVCache, RotatingKVCache.
        RuntimeError: see :meth:`AttendedCache.check_whole`.
    """
    if isinstance(cache, CompressedKVCache):
        cache.check_whole()
        return shared(cache)
    visibility = Visibility(ENDLESS)
    if type(cache) is KVCache:
        row = CompressedKVCache(visibility=visibility)
    elif type(cache) is RotatingKVCache:
        row = RotatingCompressedKVCache(cache.max_size, cache.keep, visibility=visibility)
    else:
        raise TypeError(
            f"a {type(cache).__name__} can't join a batch of compressed caches: make the "
            "prompt cache again with mlx_lm's make_prompt_cache"
        )
    if cache.offset > 0:
        keys, values = _tokens(cache)
        row.codec = KVCodec(CodecSpec(keys.shape[-1], values.shape[-1]))
        row.hold(FullPrecisionTokens(keys, values), offset=cache.offset)
        release(row.arrays)
    return row


def rows_of(batch: Any) -> tuple[list[CompressedKVCache], list[int], int]:
    """The rows of mlx-lm's batch cache, their offsets, negative in padding, and all it counts.

    Raises:
        TypeError: it is of another kind.
        ValueError: it expects padding on the right.
    """
    if type(batch) not in (BatchKVCache, BatchRotatingKVCache):
        raise TypeError(f"a {type(batch).__name__} can't join a batch of compressed caches")
    rotates = type(batch) is BatchRotatingKVCache
    check_padding(getattr(batch, "_lengths" if rotates else "_right_padding", None))
    offsets = batch.offset.tolist()
    index = max(batch._offset, *offsets) if rotates else batch._idx
    if batch.empty():
        make = partial(RotatingKVCache, batch.max_size) if rotates else KVCache
        caches = [make() for _ in offsets]
    else:
        caches = [batch.extract(i) for i in range(len(offsets))]
    return list(map(row_of, caches)), offsets, index


def alone(row: CompressedKVCache) -> CompressedKVCache | KVCache | RotatingKVCache:
    """A row as it leaves the batch, in arrays of its own; mlx-lm's caches as such."""
    return row.to_exact() if row.visibility.window == ENDLESS else detached(row)


def check_alike(rows: Sequence[CompressedKVCache]) -> None:
    """Raise ValueError if some rows forget and others don't, or not at the same size."""
    sizes = {row.ring and row.ring.max_size for row in rows}
    if len(sizes) > 1:
        shown = " and ".join(sorted("no" if size is None else str(size) for size in sizes))
        raise ValueError(
            f"caches with {shown} max_size can't share a batch: make all prompt caches with "
            "the same max_kv_size"
        )


def check_padding(expected: Any | None) -> None:
    """Raise ValueError if a batch still expects padding on the right."""
    if expected is not None:
        raise ValueError("a batch that expects padded tokens can't be joined: finalize() it first")


def _tokens(cache: Any) -> tuple[mx.array, mx.array]:
    """Keys and values (B, H, T, D) of what the next query of mlx-lm's cache can see."""
    if type(cache) is KVCache:
        keys, values = map(mx.contiguous, cache.keys_and_values())
        return keys, values
    pair = cache._temporal_order(cache.keys), cache._temporal_order(cache.values)
    # A chunk leaves more than that: what its first query saw.
    first = max(0, pair[0].shape[2] - cache.max_size) + cache.keep
    keys, values = (mx.concatenate([x[:, :, : cache.keep], x[:, :, first:]], axis=2) for x in pair)
    return keys, values

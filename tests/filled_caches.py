"""Small caches with tokens in them, alone and in batches."""

import mlx.core as mx
import pytest

from mlx_turboquant_plugin.cache import (
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS, DIM = 2, 32
CODEC = KVCodec(CodecSpec(DIM, DIM))
VISIBILITY = Visibility(window=64, sinks=4, invariant=True)


def random(length, batch=1, heads=HEADS, dim=DIM, dtype=mx.float32, seed=0):
    """Keys and values (B, H, T, D)."""
    keys = mx.random.split(mx.random.key(seed))
    return [mx.random.normal((batch, heads, length, dim), key=key).astype(dtype) for key in keys]


def plain():
    return CompressedKVCache(CODEC, VISIBILITY)


def ring(max_size=1000, keep=4):
    return RotatingCompressedKVCache(max_size, keep, CODEC, VISIBILITY)


def filled(cache, length=300):
    keys, values = random(length)
    for first in range(0, length, 100):
        part = slice(None), slice(None), slice(first, first + 100)
        cache.update_and_fetch(keys[part], values[part])
    mx.eval(cache.state)
    return cache


def batched(lengths=(300, 200)):
    """A batch whose rows are side by side."""
    batch = CompressedKVCache.merge([filled(plain(), length) for length in lengths])
    batch.update_and_fetch(*random(1, len(lengths), seed=1))
    mx.eval(batch.keys)
    return batch


def apart(lengths=(300, 200)):
    """A batch whose rows are not."""
    return CompressedKVCache.merge([filled(plain(), length) for length in lengths])


def same(a, b):
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b))


def rows_of(cache):
    return 1 if isinstance(cache, CompressedKVCache) else len(cache.left_padding)


SINGLE = pytest.mark.parametrize("make", [plain, ring])
ANY = pytest.mark.parametrize(
    "make", [lambda: filled(plain()), lambda: filled(ring()), apart, batched]
)

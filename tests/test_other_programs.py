"""What programs other than mlx-lm's own do with caches: as KVCache would have it, or an error."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from mlx_turboquant_plugin.cache import (
    BatchCompressedKVCache,
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


def packed(lengths=(300, 200)):
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


SINGLE = pytest.mark.parametrize("make", [plain, ring])
ANY = pytest.mark.parametrize("make", [lambda: filled(plain()), lambda: filled(ring()), apart, packed])


@SINGLE
@pytest.mark.parametrize("n", [1, 20, 150, 299])
def test_setting_the_offset_trims(make, n):
    ours, trimmed = filled(make()), filled(make())
    ours.offset -= n
    trim_prompt_cache([trimmed], n)
    assert ours.offset == trimmed.offset == ours.size() == 300 - n
    assert ours.nbytes == trimmed.nbytes
    more = random(40, seed=1)
    assert same(ours.update_and_fetch(*more), trimmed.update_and_fetch(*more))


@SINGLE
def test_an_offset_of_zero_empties(make):
    cache = filled(make())
    cache.offset = 0
    assert cache.empty() and cache.nbytes == 0


@SINGLE
@pytest.mark.parametrize("offset", [301, 556, -1])
def test_an_offset_of_tokens_that_are_not_there_is_refused(make, offset):
    cache = filled(make())
    before = cache.keys_and_values()
    with pytest.raises(ValueError, match=f"offset can't be set to {offset}, .*0 to 300.*trim"):
        cache.offset = offset
    assert cache.offset == 300 and same(cache.keys_and_values(), before)


def test_a_ring_that_has_forgotten_can_not_be_trimmed():
    cache = filled(ring(150))
    before = cache.keys_and_values()
    assert not cache.is_trimmable()
    for trim in (lambda: cache.trim(1), lambda: setattr(cache, "offset", 299)):
        with pytest.raises(ValueError, match="RotatingCompressedKVCache.*forgotten.*is_trimmable"):
            trim()
        assert cache.offset == 300 and same(cache.keys_and_values(), before)
    assert cache.trim(0) == 0
    assert trim_prompt_cache([cache], 1) == 0
    batch = CompressedKVCache.merge([filled(ring(150), 100), cache])
    with pytest.raises(ValueError, match="forgotten"):
        batch.trim(1)
    assert [row.offset for row in batch.rows] == [100, 300]


@pytest.mark.parametrize("make", [apart, packed])
def test_the_offset_of_a_batch_is_not_for_others(make):
    batch = make()
    before = batch.offset.tolist()
    with pytest.raises(AttributeError, match="BatchCompressedKVCache.*trim"):
        batch.offset -= 1
    # In-place arithmetic changes the very array that it is given.
    offset = batch.offset
    offset -= 1
    assert batch.offset.tolist() == before

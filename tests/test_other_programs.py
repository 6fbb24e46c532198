"""What programs other than mlx-lm's own do with caches: as KVCache would have it, or an error."""

import pickle

import mlx.core as mx
import numpy as np
import pytest
from filled_caches import (
    ANY,
    CODEC,
    DIM,
    HEADS,
    SINGLE,
    VISIBILITY,
    apart,
    batched,
    filled,
    plain,
    random,
    ring,
    rows_of,
    same,
)
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import (
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec


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


@ANY
@pytest.mark.parametrize("number", [np.int64, mx.array])
def test_trims_are_counted_by_any_integer(make, number, tmp_path):
    mlx_turboquant_plugin.enable()
    cache, path = make(), str(tmp_path / "cache.safetensors")
    size = cache.size()
    assert cache.trim(number(5)) == 5
    save_prompt_cache(path, [cache])
    assert load_prompt_cache(path)[0].size() == size - 5
    with pytest.raises(TypeError):
        cache.trim(2.0)


def test_a_ring_that_has_forgotten_can_not_be_trimmed():
    cache = filled(ring(150))
    before = cache.keys_and_values()
    assert not cache.is_trimmable()
    for trim in (lambda: cache.trim(1), lambda: setattr(cache, "offset", 299)):
        with pytest.raises(ValueError, match=r"RotatingCompressedKVCache.*forgotten.*is_trimmable"):
            trim()
        assert cache.offset == 300 and same(cache.keys_and_values(), before)
    assert cache.trim(0) == 0
    assert trim_prompt_cache([cache], 1) == 0
    batch = CompressedKVCache.merge([filled(ring(150), 100), cache])
    with pytest.raises(ValueError, match="forgotten"):
        batch.trim(1)
    assert [row.offset for row in batch.rows] == [100, 300]


@pytest.mark.parametrize("make", [apart, batched])
def test_the_offset_of_a_batch_is_not_for_others(make):
    batch = make()
    before = batch.offset.tolist()
    with pytest.raises(AttributeError, match=r"BatchCompressedKVCache.*trim"):
        batch.offset -= 1
    # In-place arithmetic changes the very array that it is given.
    offset = batch.offset
    offset -= 1
    assert batch.offset.tolist() == before


def test_arrays_are_replaced_only_by_the_same_tokens():
    """As mlx-lm does to make a cache wait for other work, but not to put in tokens."""
    for cache in (filled(plain()), filled(ring()), apart(), batched()):
        before = cache.keys_and_values()
        cache.keys = mx.depends(cache.keys, mx.zeros(1))
        for keys in (cache.keys[:, :, :-1], cache.keys.astype(mx.float16), None):
            with pytest.raises(ValueError, match="update_and_fetch"):
                cache.keys = keys
        assert same(cache.keys_and_values(), before)
    with pytest.raises(ValueError, match="update_and_fetch"):
        plain().keys = mx.zeros((1, HEADS, 8, DIM))


def attributes(cache):
    """All that a batch and its rows are, or a cache."""
    parts = [cache, *cache.__dict__.get("_rows", []), cache.__dict__.get("_batched")]
    return [dict(part.__dict__) for part in parts if part is not None]


def unfit(count, rows):
    """Keys and values of ``count`` tokens that can't be appended, by what is wrong."""
    keys, values = random(count, rows)
    yield random(count, rows, dim=DIM * 2)
    yield random(count, rows, heads=HEADS + 1)
    yield random(count, rows + 1)
    yield keys, random(count, rows + 1)[1]
    yield keys, values[:, :, 1:]
    yield keys, values[..., 1:]
    yield keys[0], values[0]


@ANY
@pytest.mark.parametrize("count", [1, 5, 100])
def test_what_does_not_fit_changes_nothing(make, count):
    cache, other = make(), make()
    rows = rows_of(cache)
    for keys, values in unfit(count, rows):
        before = attributes(cache)
        with pytest.raises(ValueError, match="do not fit this cache"):
            cache.update_and_fetch(keys, values)
        assert attributes(cache) == before
    more = random(count, rows, seed=5)
    assert same(cache.update_and_fetch(*more), other.update_and_fetch(*more))


@SINGLE
def test_a_new_cache_does_not_keep_what_it_refused(make):
    for cache in (make(), CompressedKVCache()):
        keys, values = random(8)
        with pytest.raises(ValueError, match="do not fit this cache"):
            cache.update_and_fetch(random(8, dim=64)[0], values[:, :, 1:])
        cache.update_and_fetch(keys, values)
        assert cache.offset == 8


@ANY
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_changes_nothing(make, error, monkeypatch):
    """Of a kernel, say, or Ctrl-C."""
    cache, other = make(), make()
    rows = rows_of(cache)
    calls = []

    def encode(cache, end):
        calls.append(end)
        if len(calls) == rows:
            raise error("in the middle")

    for count in (100, 5):
        calls.clear()
        before = attributes(cache)
        with monkeypatch.context() as patch:
            patch.setattr("mlx_turboquant_plugin.cache.compressed.encode", encode)
            with pytest.raises(error, match="in the middle"):
                cache.update_and_fetch(*random(count, rows))
        if cache.__dict__.get("_batched") is None:
            assert attributes(cache) == before
        more = random(count, rows, seed=5)
        assert same(cache.update_and_fetch(*more), other.update_and_fetch(*more))


def test_a_batch_that_could_not_encode_goes_on(monkeypatch):
    batch, other = batched((300, 200)), batched((300, 200))

    def encode_ahead(cache):
        raise RuntimeError("in the middle")

    # Until some row comes to the next block.
    for step in range(200):
        token = random(1, 2, seed=step)
        with monkeypatch.context() as patch:
            patch.setattr("mlx_turboquant_plugin.cache.batch.encode_ahead", encode_ahead)
            try:
                fetched = batch.update_and_fetch(*token)
            except RuntimeError:
                break
        assert same(fetched, other.update_and_fetch(*token))
    assert step < 199
    assert same(batch.update_and_fetch(*token), other.update_and_fetch(*token))
    assert batch.offset.tolist() == other.offset.tolist()


@pytest.fixture(params=[0, 4, 32, 100])
def rings(request):
    """A ring that loses nothing, and mlx-lm's own."""
    codec = KVCodec(CodecSpec(DIM, DIM, "exact", value_codec="exact"))
    ours = RotatingCompressedKVCache(300, request.param, codec, VISIBILITY)
    return ours, RotatingKVCache(300, request.param)


def close(a, b):
    """Whether keys and values are the same tokens: in which order a ring has them is its own."""
    a, b = ([mx.sort(x, axis=2) for x in pair] for pair in (a, b))
    return all(x.shape == y.shape and mx.allclose(x, y, atol=1e-4).item() for x, y in zip(a, b))


@pytest.mark.parametrize("steps", [1, 290])
@pytest.mark.parametrize("n", [1, 40, 150, 270, 289])
def test_a_trimmed_ring_holds_what_was_before(rings, n, steps):
    for cache in rings:
        keys, values = random(290)
        for first in range(0, 290, steps):
            part = slice(None), slice(None), slice(first, first + steps)
            cache.update_and_fetch(keys[part], values[part])
        cache.trim(n)
    ours, theirs = rings
    assert ours.offset == theirs.offset == 290 - n
    assert close(ours.keys_and_values(), theirs.keys_and_values())
    for count in (1, 1, 30, 1):
        more = random(count, seed=count)
        assert close(ours.update_and_fetch(*more), theirs.update_and_fetch(*more))


@pytest.mark.parametrize("length", [0, 10, 299, 300, 301, 500])
def test_an_exact_ring_goes_on_like_the_compressed_one(rings, length):
    ours = filled(rings[0], length) if length else rings[0]
    exact = ours.to_exact()
    assert type(exact) is RotatingKVCache
    assert (exact.max_size, exact.keep, exact.offset) == (300, ours.keep, length)
    for count in (1, 1, 30, 1):
        more = random(count, seed=count)
        assert close(ours.update_and_fetch(*more), exact.update_and_fetch(*more))


def test_a_cache_that_holds_codes_alone_is_not_empty():
    """Found by tests/test_cache_programs.py: all was as if nothing were there."""
    cache = filled(CompressedKVCache(CODEC, Visibility(64, 0)))
    expected = [x[:, :, :100] for x in cache.keys_and_values()]
    cache.trim(200)
    assert cache.full_tokens.count == 0 and not cache.empty()
    batch = cache.merge([cache, cache])
    assert not batch.empty()
    copies = [cache.to_exact(), batch.extract(1), pickle.loads(pickle.dumps(cache))]
    for one in (cache, *copies):
        assert one.offset == 100 and same(one.keys_and_values(), expected)
    cache.fingerprint = "aaaa"
    with pytest.raises(ValueError, match="fingerprint aaaa"):
        cache.bind(CODEC, "bbbb", "eager", True, None)


def test_a_ring_that_has_left_its_codes_behind_is_loaded():
    """Found by tests/test_cache_programs.py: no code is left, and it said it was damaged."""
    cache = ring(100)
    cache.update_and_fetch(*random(256))
    assert cache.first_quantized == cache.quantized == 160
    loaded = RotatingCompressedKVCache.from_state(cache.state)
    for count in (1, 70, 1):
        more = random(count, seed=count)
        loaded.visibility = cache.visibility
        assert same(loaded.update_and_fetch(*more), cache.update_and_fetch(*more))


@pytest.mark.parametrize(
    "theirs, ours, missing",
    [
        (lambda: KVCache(), plain, {"step"}),
        (lambda: RotatingKVCache(64, 4), ring, {"step"}),
        (lambda: BatchKVCache([0, 0]), apart, {"step", "values"}),
        (
            lambda: BatchRotatingKVCache(64, [0, 0]),
            apart,
            {"step", "values", "max_size", "rotated", "to_quantized"},
        ),
    ],
    ids=["KVCache", "RotatingKVCache", "BatchKVCache", "BatchRotatingKVCache"],
)
def test_all_that_mlx_lms_caches_have_is_there_or_says_what_to_use(theirs, ours, missing):
    original, cache = theirs(), ours()
    original.update_and_fetch(*random(40, rows_of(cache)))
    public = {name for name in dir(original) if not name.startswith("_")}
    assert {name for name in public if not hasattr(cache, name)} == missing
    for name in missing:
        with pytest.raises(AttributeError, match=rf"has no {name}, .*to_exact\(\) gives"):
            getattr(cache, name)

"""What programs other than mlx-lm's own do with caches: as KVCache would have it, or an error."""

import copy
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin import compiling
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


def test_arrays_are_replaced_only_by_the_same_tokens():
    """As mlx-lm does to make a cache wait for other work, but not to put in tokens."""
    for cache in (filled(plain()), filled(ring()), apart(), packed()):
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
    parts = [cache, *cache.__dict__.get("_rows", []), cache.__dict__.get("_packed")]
    return [dict(part.__dict__) for part in parts if part is not None]


def rows_of(cache):
    return 1 if isinstance(cache, CompressedKVCache) else len(cache.left_padding)


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

    def encode(self, end):
        calls.append(end)
        if len(calls) == rows:
            raise error("in the middle")

    for count in (100, 5):
        calls.clear()
        before = attributes(cache)
        with monkeypatch.context() as patch:
            patch.setattr(CompressedKVCache, "encode", encode)
            with pytest.raises(error, match="in the middle"):
                cache.update_and_fetch(*random(count, rows))
        if cache.__dict__.get("_packed") is None:
            assert attributes(cache) == before
        more = random(count, rows, seed=5)
        assert same(cache.update_and_fetch(*more), other.update_and_fetch(*more))


def test_a_batch_that_could_not_encode_goes_on(monkeypatch):
    batch, other = packed((300, 200)), packed((300, 200))

    def encode_ahead(self):
        raise RuntimeError("in the middle")

    # Until some row comes to the next block.
    for step in range(200):
        token = random(1, 2, seed=step)
        with monkeypatch.context() as patch:
            patch.setattr(CompressedKVCache, "encode_ahead", encode_ahead)
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


def in_another_thread(function):
    """What ``function`` returns there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def trimmed(cache):
    cache.trim(2)
    return cache


def rewound(cache):
    cache.offset -= 2
    return cache


def extracted(cache):
    return CompressedKVCache.merge([cache, cache]).extract(1)


def merged(cache):
    exact = KVCache() if type(cache) is CompressedKVCache else cache.emptied()
    return cache.merge([cache, filled(exact, 200)])


def restored(cache):
    return type(cache).from_state(cache.state)


def exact(cache):
    return cache.to_exact()


def looked_at(cache):
    assert cache.nbytes > 0 and cache.size() == 300
    return cache


def prompted(cache):
    mx.eval(cache.update_and_fetch(*random(100, seed=2)))
    return cache


def stepped(cache):
    for seed in range(40):
        fetched = cache.update_and_fetch(*random(1, seed=seed))
    mx.eval(fetched)
    return cache


def unpacked_by(change):
    def changed(cache):
        batch = cache.merge([cache, filled(cache.emptied(), 200)])
        mx.eval(batch.update_and_fetch(*random(1, 2, seed=1)))
        return change(batch)

    return changed


def filtered(batch):
    batch.filter([1])
    return batch


def extended(batch):
    batch.extend(copy.deepcopy(batch))
    return batch


def extracted_from(batch):
    """The batch that is left."""
    batch.extract(0)
    return batch


CHANGES = [trimmed, rewound, extracted, merged, restored, exact, looked_at, prompted, stepped]
CHANGES += [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
BATCH_CHANGES = [filtered, extended, trimmed, extracted_from, copy.deepcopy]
CHANGES += [unpacked_by(change) for change in (*BATCH_CHANGES, lambda batch: batch.extract(0))]


@pytest.mark.parametrize("change", CHANGES)
@SINGLE
def test_another_thread_goes_on(make, change):
    """Arrays that one thread has not evaluated are no use to another."""

    def go_on(cache):
        rows = cache.offset.size if isinstance(cache.offset, mx.array) else 1
        fetched = [cache.update_and_fetch(*random(count, rows, seed=9)) for count in (1, 20)]
        mx.eval(fetched)
        return [np.array(x) for pair in fetched for x in pair]

    expected = go_on(change(filled(make())))
    cache = filled(make())
    changed = in_another_thread(lambda: change(cache))
    got = in_another_thread(lambda: go_on(changed))
    assert all(map(np.array_equal, got, expected))


@ANY
def test_looking_at_a_cache_leaves_it_to_its_thread(make):
    """Statistics, read by another thread while this one generates."""
    cache, other = make(), make()
    rows = rows_of(cache)
    for count in (1, 1, 20, 1):
        more = random(count, rows, seed=count)
        fetched = cache.update_and_fetch(*more)
        in_another_thread(lambda: (cache.nbytes, cache.size(), cache.empty(), cache.offset))
        assert same(fetched, other.update_and_fetch(*more))
        assert cache.nbytes == other.nbytes


@ANY
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_pickled_cache_goes_on(make, dtype):
    cache = make()
    rows = rows_of(cache)
    cache.attention = weakref.ref(plain)
    loaded = pickle.loads(pickle.dumps(cache))
    assert type(loaded) is type(cache)
    assert (loaded.size(), loaded.nbytes) == (cache.size(), cache.nbytes)
    for count in (1, 50, 1):
        more = random(count, rows, seed=count, dtype=dtype)
        assert same(loaded.update_and_fetch(*more), cache.update_and_fetch(*more))


@SINGLE
def test_a_cache_of_bfloat16_is_pickled_as_such(make):
    cache = make()
    cache.update_and_fetch(*random(300, dtype=mx.bfloat16))
    loaded = pickle.loads(pickle.dumps(cache))
    assert loaded.keys.dtype == mx.bfloat16
    assert same(loaded.keys_and_values(), cache.keys_and_values())


@pytest.mark.parametrize("cache", [plain(), ring(), CompressedKVCache()])
def test_an_empty_cache_is_pickled(cache):
    loaded = pickle.loads(pickle.dumps(cache))
    assert type(loaded) is type(cache) and loaded.empty()
    assert (loaded.visibility, loaded.ring) == (cache.visibility, cache.ring)


def test_a_pickled_batch_still_expects_its_padding():
    batch, other = apart(), apart()
    for one in (batch, other):
        one.prepare(lengths=[30, 10], right_padding=[0, 20])
    batch = pickle.loads(pickle.dumps(batch))
    for one in (batch, other):
        one.update_and_fetch(*random(30, 2, seed=3))
        one.finalize()
    assert batch.offset.tolist() == other.offset.tolist() == [330, 210]
    assert same(batch.keys_and_values(), other.keys_and_values())


@pytest.mark.parametrize("change", [copy.deepcopy, lambda caches: pickle.loads(pickle.dumps(caches))])
def test_another_thread_decodes_after_a_prompt(change, monkeypatch):
    """Only the logits of the prompt were evaluated, as with KVCache is enough."""
    model, tokenizer = tiny.load("tiny-qwen2")
    tokens = mx.array([tiny.text_tokens(tokenizer, 260)] * 2)
    # MLX would compile for each thread.
    monkeypatch.setattr(compiling, "_building", True)
    mlx_turboquant_plugin.enable(kernel="eager")

    def prompt():
        caches = [cache.merge([cache] * 2) for cache in make_prompt_cache(model)]
        for first in (0, 130):
            mx.eval(model(tokens[:, first : first + 130], cache=caches))
        return change(caches)

    def decode(caches):
        trim_prompt_cache(caches, 3)
        return np.array(model(tokens[:, 257:258], cache=caches))

    expected = decode(prompt())
    caches = in_another_thread(prompt)
    np.testing.assert_array_equal(in_another_thread(lambda: decode(caches)), expected)


DTYPES = list(itertools.permutations([mx.float32, mx.bfloat16, mx.float16], 2))


def of_two_dtypes(length, dtypes, batch=1, seed=0):
    return [x.astype(dtype) for x, dtype in zip(random(length, batch, seed=seed), dtypes)]


@pytest.mark.parametrize("dtypes", DTYPES)
@SINGLE
def test_keys_and_values_of_two_dtypes_are_saved_and_loaded(make, dtypes, tmp_path):
    mlx_turboquant_plugin.enable()
    cache = make()
    cache.update_and_fetch(*of_two_dtypes(300, dtypes))
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [cache])
    for loaded in (*mlx_lm_cache.load_prompt_cache(path), pickle.loads(pickle.dumps(cache))):
        loaded.visibility = cache.visibility
        assert same(loaded.keys_and_values(), cache.keys_and_values())
        assert tuple(x.dtype for x in loaded.keys_and_values()) == dtypes


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_batch_keeps_two_dtypes(dtypes):
    rows = [plain(), plain(), plain()]
    for row, own in zip(rows, (dtypes, dtypes, dtypes[:1] * 2)):
        row.update_and_fetch(*of_two_dtypes(200, own))
    batch = plain().merge(rows)
    for _ in range(2):
        more = of_two_dtypes(1, dtypes, batch=3)
        batch.update_and_fetch(*more)
        for index, row in enumerate(rows):
            row.update_and_fetch(*(x[index : index + 1] for x in more))
    for index, row in enumerate(rows):
        extracted = batch.extract(index)
        assert extracted.exact_tokens.dtypes == row.exact_tokens.dtypes
        assert same(extracted.keys_and_values(), row.keys_and_values())


@pytest.mark.parametrize("held, given", DTYPES)
@pytest.mark.parametrize("count", [1, 30])
def test_later_tokens_take_the_dtype_of_the_first(held, given, count):
    """As in KVCache."""
    caches = CompressedKVCache(), KVCache()
    for cache in caches:
        cache.update_and_fetch(*random(20, dtype=held))
        cache.update_and_fetch(*random(count, dtype=given, seed=1))
    ours, theirs = (cache.keys_and_values() for cache in caches)
    assert ours[0].dtype == ours[1].dtype == held
    assert same(ours, theirs)


def test_a_cache_that_holds_codes_alone_is_not_empty():
    """Found by tests/test_cache_programs.py: all was as if nothing were there."""
    cache = filled(CompressedKVCache(CODEC, Visibility(64, 0)))
    expected = [x[:, :, :100] for x in cache.keys_and_values()]
    cache.trim(200)
    assert cache.exact_tokens.count == 0 and not cache.empty()
    batch = cache.merge([cache, cache])
    assert not batch.empty()
    copies = [cache.to_exact(), batch.extract(1), pickle.loads(pickle.dumps(cache))]
    for one in (cache, *copies):
        assert one.offset == 100 and same(one.keys_and_values(), expected)
    cache.fingerprint = "aaaa"
    with pytest.raises(ValueError, match="fingerprint aaaa"):
        cache.bind(CODEC, "bbbb", "eager", True, None)

"""Caches that go from one thread, process or file to another, in whatever dtypes."""

import copy
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import tiny
from filled_caches import (
    ANY,
    SINGLE,
    apart,
    filled,
    plain,
    random,
    ring,
    rows_of,
    same,
)
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    KVCache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache


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


def separated_by(change):
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
CHANGES += [separated_by(change) for change in (*BATCH_CHANGES, lambda batch: batch.extract(0))]


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


def test_another_thread_decodes_after_a_prompt():
    """Only the logits of the prompt were evaluated, as with KVCache is enough."""
    model, tokenizer = tiny.load("tiny-qwen2")
    tokens = mx.array([tiny.text_tokens(tokenizer, 260)] * 2)
    mlx_turboquant_plugin.enable(kernel="eager")

    def prompt():
        caches = [cache.merge([cache] * 2) for cache in make_prompt_cache(model)]
        for first in (0, 130):
            mx.eval(model(tokens[:, first : first + 130], cache=caches))
        return pickle.loads(pickle.dumps(copy.deepcopy(caches)))

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
        assert extracted.full_tokens.dtypes == row.full_tokens.dtypes
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

"""The compressed cache by itself: what it holds, forgets, copies, saves and refuses."""

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from layouts import layout
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, save_prompt_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.backends import backend
from mlx_turboquant_plugin.cache import (
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS = 2
VISIBILITY = Visibility(window=64, sinks=4, invariant=True)


def random(length, dim=64, batch=1, dtype=mx.float32, seed=0):
    """Keys and values (B, H, T, D)."""
    mx.random.seed(seed)
    return [mx.random.normal((batch, HEADS, length, dim)).astype(dtype) for _ in range(2)]


def codec(dim=64, biased=False, **spec):
    bias = KeyBias(mx.random.normal((HEADS, dim), key=mx.random.key(1)) * 20, nn.RoPE(dim))
    balance = mx.exp(0.3 * mx.random.normal((HEADS, 1, dim), key=mx.random.key(2)))
    return KVCodec(CodecSpec(dim, dim, **spec), *((balance, bias) if biased else ()))


def filled(length=300, chunk=100, cache=None):
    """A cache with the first ``length`` of always the same tokens."""
    cache = cache or CompressedKVCache(codec(), VISIBILITY)
    return fill(cache, length, chunk)


def fill(cache, length, chunk):
    keys, values = random(400)
    for first in range(cache.offset, length, chunk):
        last = min(length, first + chunk)
        cache.update_and_fetch(*(x[:, :, first:last] for x in (keys, values)))
    return cache


def same(a, b):
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b))


def codes(cache):
    return *cache.key_codes, *cache.value_codes


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dim, biased", [(64, False), (64, True), (80, False), (128, True)])
def test_fetched_are_full_precision_sinks_and_window_and_decoded_codes(dim, biased, batch, dtype):
    c = codec(dim, biased)
    cache = CompressedKVCache(c, VISIBILITY)
    keys, values = random(300, dim, batch, dtype)
    got = cache.update_and_fetch(keys, values)
    begin = VISIBILITY.full_from(299)
    assert begin == 224 and cache.quantized == begin
    decoded = (
        c.decode_keys(c.encode_keys(keys[:, :, :begin], 0), 0),
        c.decode_values(c.encode_values(values[:, :, :begin])),
    )
    for ours, original, quantized in zip(got, (keys, values), decoded):
        assert ours.shape == original.shape and ours.dtype == dtype
        assert mx.array_equal(ours[:, :, :4], original[:, :, :4])
        assert mx.array_equal(ours[:, :, begin:], original[:, :, begin:])
        np.testing.assert_allclose(
            ours[:, :, 4:begin].astype(mx.float32),
            quantized[:, :, 4:].astype(dtype).astype(mx.float32),
            rtol=1e-2,
            atol=1e-5,
        )
        assert not mx.array_equal(ours[:, :, 4:begin], original[:, :, 4:begin])


def test_without_arguments_it_is_used_like_kvcache():
    ours, stock = CompressedKVCache(), KVCache()
    assert ours.empty() and ours.size() == stock.size() == ours.offset == ours.nbytes == 0
    for count in (40, 1, 7):
        keys, values = random(count)
        assert same(ours.update_and_fetch(keys, values), stock.update_and_fetch(keys, values))
        assert ours.offset == stock.offset == ours.size()
        for n, return_array, window in (
            (5, True, None),
            (5, False, None),
            (1, False, None),
            (5, False, 4),
        ):
            a, b = (
                cache.make_mask(n, return_array=return_array, window_size=window)
                for cache in (ours, stock)
            )
            assert type(a) is type(b)
            assert mx.array_equal(a, b) if isinstance(a, mx.array) else a == b
    assert not ours.empty() and ours.is_trimmable() and bool(ours)
    # mlx-lm takes its own quantized path for caches that have bits.
    assert not hasattr(ours, "bits")


@pytest.fixture(params=[False, True], ids=["any", "fixed_shapes"])
def fixed_shapes(request, monkeypatch):
    """Caches as they are for kernels that like arrays to keep their shapes."""
    if request.param:
        monkeypatch.setattr(backend("eager"), "fixed_shapes", True)


@pytest.mark.parametrize("window, sinks", [(0, 4), (32, 0), (64, 4)])
def test_a_cache_of_fixed_shapes_always_holds_as_many_full_precision_tokens(
    window, sinks, monkeypatch
):
    plain, ours = (CompressedKVCache(codec(), Visibility(window, sinks)) for _ in range(2))
    fill(plain, 300, 1)
    monkeypatch.setattr(backend("eager"), "fixed_shapes", True)
    fill(ours, 230, 230)
    counts = {fill(ours, length, 1).full_tokens.count for length in range(230, 301)}
    assert counts == {sinks + window + 48}
    assert same(ours.keys_and_values(), plain.keys_and_values())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 100])
def test_chunks_do_not_matter(chunk, biased, fixed_shapes):
    whole = filled(chunk=300, cache=CompressedKVCache(codec(64, biased), VISIBILITY))
    parts = filled(chunk=chunk, cache=CompressedKVCache(codec(64, biased), VISIBILITY))
    assert parts.quantized == whole.quantized
    if not biased:
        assert same(codes(parts), codes(whole))
    # The angles of the bias are rounded in another order.
    for a, b in zip(parts.keys_and_values(), whole.keys_and_values()):
        differ = mx.abs(a - b) > 1e-3
        assert mx.mean(differ.astype(mx.float32)).item() <= (1e-3 if biased else 0)


@pytest.mark.parametrize("n", [0, 1, 16, 17, 60, 150, 299, 300, 1000])
def test_trim_keeps_what_was_before(n):
    cache = filled()
    before = cache.keys_and_values()
    trimmed = cache.trim(n)
    left = 300 - min(n, 300)
    assert trimmed == min(n, 300) and cache.offset == left
    if left == 0:
        assert cache.empty() and cache.nbytes == 0
        return
    after = cache.keys_and_values()
    for old, new in zip(before, after):
        assert new.shape[2] == left
        assert mx.array_equal(new[:, :, :4], old[:, :, : min(4, left)])
    # What was decoded stays decoded, and codes never change.
    fresh = filled()
    assert same([x[..., : cache.quantized] for x in fresh.key_codes], cache.key_codes)


@pytest.mark.parametrize("chunk", [1, 16, 30])
def test_a_short_trim_leaves_no_trace(chunk, fixed_shapes):
    plain, trimmed = filled(400, chunk=1), filled(330, chunk=1)
    assert trimmed.trim(16) == 16
    fill(trimmed, 400, chunk)
    assert same(trimmed.keys_and_values(), plain.keys_and_values())
    assert same(codes(trimmed), codes(plain))


def test_after_a_long_trim_the_rest_is_there_as_codes():
    cache, plain = filled(300), filled(150)
    cache.trim(150)
    keys, values = cache.keys_and_values()
    expected = filled().keys_and_values()
    assert mx.array_equal(keys, expected[0][:, :, :150])
    assert mx.array_equal(values, expected[1][:, :, :150])
    # It goes on as any other: later tokens are in full precision.
    more = random(40, seed=5)
    for c in (cache, plain):
        c.update_and_fetch(*more)
    assert mx.array_equal(cache.keys_and_values()[0][:, :, 150:], more[0])
    assert cache.offset == plain.offset == 190


def test_copies_do_not_mix():
    cache = filled()
    before = [mx.array(x) for x in cache.keys_and_values()]
    other = copy.deepcopy(cache)
    other.update_and_fetch(*random(90, seed=1))
    other.trim(200)
    assert cache.offset == 300 and same(cache.keys_and_values(), before)
    a, b = copy.deepcopy(cache), copy.deepcopy(cache)
    more = random(70, seed=2)
    assert same(a.update_and_fetch(*more), b.update_and_fetch(*more))


def test_every_byte_is_counted_and_there_is_no_spare_room():
    cache = filled(300)
    arrays = (cache.keys, cache.values, *codes(cache))
    assert cache.nbytes == sum(array.nbytes for array in arrays)
    assert all(x.shape[3] == cache.quantized for x in cache.key_codes)
    assert all(x.shape[2] == cache.quantized for x in cache.value_codes)
    assert cache.keys.shape[2] <= 4 + 64 + 32 + 16


@pytest.mark.parametrize("dim, bound", [(128, 4.05), (64, 4.0)])
def test_at_8192_tokens_it_is_four_times_smaller_than_kvcache(dim, bound):
    keys, values = random(8192, dim, dtype=mx.bfloat16)
    ours, stock = CompressedKVCache(KVCodec(CodecSpec(dim, dim))), KVCache()
    for cache in (ours, stock):
        cache.update_and_fetch(keys, values)
    assert stock.nbytes / ours.nbytes >= bound


def test_kv_bits_are_ignored_with_one_line(caplog):
    cache = filled()
    assert cache.to_quantized(64, 8) is cache
    assert "kv_bits=8 is ignored" in caplog.text


def test_a_filled_cache_keeps_to_its_layer():
    cache = CompressedKVCache(codec(), VISIBILITY)
    cache.bind(codec(), "aaaa", "eager", True, None)
    filled(cache=cache)
    with pytest.raises(ValueError, match="fingerprint aaaa, this one is bbbb"):
        cache.bind(codec(), "bbbb", "eager", True, None)
    with pytest.raises(ValueError, match="made for head dim 64, the model has 128"):
        cache.bind(codec(128), "aaaa", "eager", True, None)
    # Other bits are fine: the codes that there are keep their own.
    cache.bind(codec(key_bits=2), "aaaa", "eager", True, None)
    assert cache.codec.spec.key_bits == 4


@pytest.fixture
def saved(tmp_path):
    """A function that saves caches and loads them again."""
    mlx_turboquant_plugin.enable()

    def save(*caches):
        path = str(tmp_path / "cache.safetensors")
        save_prompt_cache(path, list(caches))
        return mlx_lm_cache.load_prompt_cache(path)

    return save


def test_saved_and_loaded_caches_go_on_alike(saved):
    ring = RotatingCompressedKVCache(150, 4, codec(), VISIBILITY)
    caches = [filled(), filled(40), CompressedKVCache(codec(), VISIBILITY), filled(cache=ring)]
    loaded = saved(*caches)
    assert [type(cache) for cache in loaded] == [type(cache) for cache in caches]
    more = random(80, seed=3)
    for ours, theirs in zip(caches, loaded):
        assert theirs.offset == ours.offset and theirs.nbytes == ours.nbytes
        # A file does not say: what is in force when it is used counts.
        theirs.codec, theirs.visibility = ours.codec, ours.visibility
        assert same(ours.update_and_fetch(*more), theirs.update_and_fetch(*more))


def test_a_loaded_cache_without_its_models_bias_can_not_be_read(saved):
    cache = filled(cache=CompressedKVCache(codec(64, True), VISIBILITY))
    (loaded,) = saved(cache)
    with pytest.raises(ValueError, match="leaves out a bias of the keys"):
        loaded.keys_and_values()
    loaded.bind(cache.codec, "", "eager", True, None)
    assert same(loaded.keys_and_values(), cache.keys_and_values())


def damaged(cache, part, value):
    state = list(cache.state)
    state[part] = value(state[part])
    return state


def described(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "part, value, message",
    [
        (0, lambda _: "turboquant-kv/9", "format 'turboquant-kv/9', expected 'turboquant-kv/2'"),
        (0, lambda _: mx.zeros(3), "format unknown"),
        (1, lambda _: "{", "unreadable description"),
        (1, described(codec={"head_dim": 64}), "unreadable description"),
        (1, described(codec={"head_dim": 64, "value_dim": 64, "key_codec": "zip"}), "description"),
        (1, described(ring={"max_size": 5}), "unreadable description"),
        (1, lambda text: text.replace('"value_bits": 3', '"value_bits": 7'), "7 bits"),
        (1, lambda text: text.replace('"seed": 2504', '"seed": "a"'), "unreadable description"),
        (1, described(visibility={"window": 33, "sinks": 4}), "unreadable description"),
        (1, described(visibility={"window": "a", "sinks": 4}), "unreadable description"),
        (1, described(rotation=1), "its rotation is not the one that this version makes"),
        (1, described(first_coded=32), "tokens do not make 300"),
        (3, lambda _: 3000, "tokens do not make 3000"),
        (4, lambda keys: keys[:, :, 1:], "keys and values do not have the shapes"),
        (4, lambda keys: keys[..., :32], "keys and values do not have the shapes"),
        (4, lambda keys: keys.astype(mx.int32), "keys and values do not have the shapes"),
        (6, lambda codes: codes[1:], "its codes do not have the shapes"),
        (6, lambda codes: tuple(x.astype(mx.uint32) for x in codes), "its codes do not have"),
        (7, lambda codes: tuple(x[:, :, :-1] for x in codes), "its codes do not have the shapes"),
        (8, lambda _: mx.ones((3, 1, 64)), "its key balance does not have the shape"),
        (8, lambda _: mx.full((2, 1, 64), float("nan")), "its key balance is not made of numbers"),
        (8, lambda _: mx.zeros((2, 1, 64)), "its key balance is not positive"),
        (8, lambda _: mx.ones((2, 1, 64), mx.int32), "its key balance is not made of numbers"),
        (9, lambda _: mx.zeros((2, 65), mx.int32) + 5, "its key layout is no order"),
        (9, lambda _: layout(2, 64) + mx.where(mx.arange(65) < 64, 0, 3), "its key layout is no"),
        (9, lambda _: layout(2, 64).astype(mx.float32), "its key layout is no order"),
        (9, lambda _: layout(2, 64)[:, 1:], "its key layout does not have the shape"),
        (10, lambda _: mx.ones((3, 64)), "its key bias does not have the shape"),
        (10, lambda _: mx.full((2, 64), float("inf")), "its key bias is not made of numbers"),
        (11, lambda _: mx.ones((2, 63)), "its table of query squares does not have the shape"),
        (11, lambda _: mx.zeros((2, 64)), "its table of query squares is not positive"),
    ],
)
def test_a_damaged_state_is_refused(part, value, message):
    with pytest.raises(ValueError, match=message):
        CompressedKVCache.from_state(damaged(filled(), part, value))


def old_state(cache, biased=False):
    """The state of ``cache`` as the first version wrote it."""
    state = damaged(cache, 1, described(biased=biased))[:9]
    return ["turboquant-kv/1", *state[1:]]


def test_files_of_the_first_version_are_read_if_they_left_out_no_bias():
    cache = filled()
    loaded = CompressedKVCache.from_state(old_state(cache))
    assert same(loaded.keys_and_values(), cache.keys_and_values())
    with pytest.raises(ValueError, match="an older version left its model's key bias out"):
        CompressedKVCache.from_state(old_state(cache, biased=True))


def test_files_need_not_say_how_to_round():
    cache = filled()
    loaded = CompressedKVCache.from_state(cache.state[:-1])
    assert same(loaded.keys_and_values(), cache.keys_and_values())


def test_a_state_of_too_few_parts_is_refused():
    with pytest.raises(ValueError, match="10 parts, expected 12"):
        CompressedKVCache.from_state(filled().state[:-2])


def test_damaged_and_foreign_files_are_refused(tmp_path):
    mlx_turboquant_plugin.enable()
    path = tmp_path / "cache.safetensors"
    save_prompt_cache(str(path), [filled(), filled()])
    whole = path.read_bytes()
    for size in (0, 4, 100, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"prompt cache {path}: damaged or cut short"):
            mlx_lm_cache.load_prompt_cache(str(path))
    mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    with pytest.raises(ValueError, match="not a file of mlx-lm's save_prompt_cache"):
        mlx_lm_cache.load_prompt_cache(str(path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        mlx_lm_cache.load_prompt_cache(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("ours", [False, True])
def test_an_uncompressed_file_says_that_it_stays_so(ours, saved, caplog):
    cache = filled(cache=None if ours else KVCache())
    [loaded] = saved(cache)
    assert type(loaded) is type(cache)
    assert [("stays so" in record.message) for record in caplog.records] == [True] * (not ours)


def test_files_of_unknown_classes_are_refused(tmp_path):
    class LaterKVCache(KVCache):
        pass

    mlx_turboquant_plugin.enable()
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [LaterKVCache()])
    with pytest.raises(ValueError, match="class LaterKVCache"):
        mlx_lm_cache.load_prompt_cache(path)


def test_outside_attention_it_holds_no_more_than_it_counts():
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = CompressedKVCache(KVCodec(CodecSpec(64, 64)))
    x = mx.random.normal((1, 2, 8192, 64))
    cache.update_and_fetch(x, x)
    mx.eval(cache.state)
    del x
    mx.clear_cache()
    assert mx.get_active_memory() - before < 2 * cache.nbytes


def test_a_ring_that_only_keeps_its_first_tokens_is_mlx_lms_own():
    """RotatingKVCache itself is at a loss there."""
    mlx_turboquant_plugin.enable()
    caches = mlx_lm_cache.make_prompt_cache(tiny_models.build("qwen3"), max_kv_size=4)
    assert {type(cache) for cache in caches} == {mlx_lm_cache.RotatingKVCache}

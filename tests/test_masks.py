"""Attention masks over compressed caches do what they do over mlx-lm's own caches."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from masks import (
    DIM,
    HEADS,
    KV_HEADS,
    LARGE,
    LEARNED_SINKS,
    LOSSLESS,
    WAYS,
    Caches,
    appended,
    arrays,
    attend_by,
    kernel_of,
    own,
    random,
)
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import BatchKVCache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.attention import dispatch
from mlx_turboquant_plugin.cache import (
    BatchCompressedKVCache,
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

LOSSY = KVCodec(CodecSpec(DIM, DIM))
RING, COUNTS = 100, (1, 5, 40)

BY_NAME = {"None": (None, None), "causal": ("causal", "causal")}
MANY = (150, 70, 1, 1)


@pytest.mark.parametrize(
    "history, counts", [((), COUNTS), ((20,), COUNTS), (MANY, (*COUNTS, LARGE))], ids=str
)
def test_one_sequence(history, counts):
    for count in counts:
        caches = Caches.single(history)
        one = mx.ones((1, 1), mx.bool_)
        masks = {**BY_NAME, **own(caches, count, None, 20, 120), "(1, 1)": (one, one)}
        caches.compare(count, {**masks, **arrays(caches, count, sum(history) + count)})


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize(
    "history, counts",
    [
        ((), (*COUNTS, LARGE)),
        ((2,), (1, 5)),
        ((60,), COUNTS),
        ((40, 59), COUNTS),
        ((40, 60), COUNTS),
        ((250,), COUNTS),
        ((150, 40, 1, 1), (*COUNTS, LARGE)),
    ],
    ids=str,
)
def test_a_ring(history, counts, keep):
    for count in counts:
        caches = Caches.single(history, RING, keep)
        masks = {**BY_NAME, **own(caches, count, None, RING)}
        if count > 1 or sum(history) < RING:
            masks.update(arrays(caches, count, min(RING - 1, sum(history)) + count))
        caches.compare(count, masks)


RAGGED = ((70, 40, 1), (33,), (6,))
EQUAL = ((90, 10), (90, 10))


@pytest.mark.parametrize(
    "histories, padded, counts",
    [
        (RAGGED, False, COUNTS),
        (RAGGED, True, (*COUNTS, LARGE)),
        (EQUAL, False, COUNTS),
        (EQUAL, True, COUNTS),
        (((), (), ()), False, COUNTS),
        (((), (), ()), True, COUNTS),
    ],
    ids=str,
)
def test_a_batch(histories, padded, counts):
    for count in counts:
        caches = Caches.batch(histories)
        if padded:
            caches.prepare([max(1, count - 7 * row) for row in range(len(histories))])
        masks = own(caches, count, None, 20, 120)
        if not any(caches.left + caches.right):
            masks.update(BY_NAME)
        tokens = max(map(sum, histories)) + count
        caches.compare(count, {**masks, **arrays(caches, count, tokens, causal=padded)})
        caches.finalize()
        if count > 1:
            # Batched, if all rows are long enough.
            caches.compare(1, {**own(caches, 1, 20), **arrays(caches, 1, tokens + 1)})


def test_a_batch_padded_on_the_left():
    left = [20, 0, 7]
    for count in COUNTS:
        ours = []
        for path, invariant in WAYS:
            ours.append(BatchCompressedKVCache(left))
            ours[-1].bind(LOSSLESS, "", kernel_of(path), invariant, None)
        caches = Caches(BatchKVCache(left), ours)
        masks = own(caches, count, None, 20)
        if count > max(left):
            masks.update(arrays(caches, count, count))
        caches.compare(count, masks)
        caches.compare(33, {**own(caches, 33, None, 20), **arrays(caches, 33, count + 33)})
        caches.compare(1, {**own(caches, 1, None, 20), **arrays(caches, 1, count + 34)})


@pytest.mark.parametrize("padded", [False, True], ids=["full", "right-padded"])
@pytest.mark.parametrize(
    "histories, counts",
    [
        (((60,), (30,), (5,)), COUNTS),
        (((150, 1), (60,)), (*COUNTS, LARGE)),
        (((150, 1), (120, 90)), COUNTS),
    ],
    ids=["short", "ragged", "long"],
)
def test_a_batch_of_rings(histories, counts, padded):
    longest = max(map(sum, histories))
    for count in counts:
        caches = Caches.batch(histories, RING)
        if padded:
            caches.prepare([max(1, count - 7 * row) for row in range(len(histories))])
        masks = own(caches, count, None, RING, 20)
        if longest < RING:
            masks.update(arrays(caches, count, longest + count, causal=padded))
        caches.compare(count, masks)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["one", "ring", "batch"])
def test_in_half_precision(kind, dtype, monkeypatch):
    monkeypatch.setattr(Caches, "dtype", dtype)
    for count in (1, 20):
        if kind == "batch":
            caches = Caches.batch(((120, 1), (60,)))
        else:
            caches = Caches.single((120,), 150 if kind == "ring" else None)
        masks = arrays(caches, count, 121 + count if kind == "batch" else 120 + count)
        caches.compare(count, {**masks, **own(caches, count, None)})


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 40])
def test_what_sees_nothing_stays_a_number(count, dtype):
    """Every second query, and all of those of the batch's first row."""
    seen = (mx.arange(count)[:, None] % 2 == 1) & (mx.arange(3) > 0)[:, None, None, None]
    sinks = (None, LEARNED_SINKS.astype(dtype))
    for kind in ("one", "batch"):
        rows = 3 if kind == "batch" else 1
        for before in (0, 260):
            shown = mx.broadcast_to(seen[:rows], (rows, 1, count, before + count))
            masks = [shown] + [
                mx.where(shown, 0.0, x).astype(dtype) for x in (-mx.inf, mx.finfo(dtype).min, -1e9)
            ]
            # All scores are about -90: less than the lowest number of fp16, with a mask's.
            queries = mx.full((rows, HEADS, count, DIM), -4.0, dtype)
            for (path, _), cache in zip(WAYS, Caches.single().ours):
                cache = cache.merge([cache] * 3) if kind == "batch" else cache
                for new in filter(None, (before, count)):
                    tokens = [(4 + random(rows, KV_HEADS, new)).astype(dtype) for _ in range(2)]
                    view = appended(cache, *tokens)
                for mask in masks:
                    for learned in sinks:
                        out = attend_by(path, view, cache, queries, mask, learned)
                        assert mx.all(mx.isfinite(out)).item()


@pytest.mark.parametrize("path", ["tiles", "gpu"])
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("kind", ["one", "ring", "batch"])
def test_hidden_tokens_do_not_count(kind, count, path):
    """Neither through their codes nor exactly."""
    rows = 2 if kind == "batch" else 1
    tokens, hidden = RING + count - 1, [2, 7, 40, 90]
    keys, values = random(rows, KV_HEADS, tokens), random(rows, KV_HEADS, tokens)
    queries = random(rows, HEADS, count)
    shown = mx.all(mx.arange(tokens) != mx.array(hidden)[:, None], axis=0)
    others = mx.where(shown[:, None], keys, -keys)

    def output(keys, mask):
        parts = LOSSY, Visibility(32, 4), "eager"
        caches = [CompressedKVCache(*parts) for _ in range(rows)]
        if kind == "ring":
            caches = [RotatingCompressedKVCache(RING, 4, *parts)]
        cache = caches[0].merge(caches) if kind == "batch" else caches[0]
        for new in (slice(0, tokens - count), slice(tokens - count, tokens)):
            view = appended(cache, keys[:, :, new], values[:, :, new])
        return np.array(attend_by(path, view, cache, queries, mask))

    for mask in (shown, mx.where(shown, 0.0, -mx.inf)[None, None, None]):
        np.testing.assert_allclose(output(others, mask), output(keys, mask), atol=1e-6)
    everything = mx.ones((tokens,), mx.bool_)
    assert np.abs(output(others, everything) - output(keys, everything)).max() > 1e-3


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("ring", [None, RING])
def test_a_batch_knows_its_own_mask(ring, count, monkeypatch):
    """It need not be looked into, which would cost as much as any other."""
    seen = []
    tiles = dispatch.attend_tiles
    monkeypatch.setattr(
        dispatch,
        "attend_tiles",
        lambda queries, view, scale, mask, *rest: (
            seen.append(mask) or tiles(queries, view, scale, mask, *rest)
        ),
    )
    cache = Caches.batch(((150,), (120,)), ring).ours[0]
    queries, new = random(2, HEADS, count), random(2, KV_HEADS, count)
    # Short of a row's sinks rows are not batched.
    cache.extend(Caches.single(()).ours[0].merge([Caches.single((), ring).ours[0]]))
    queries, new = (mx.concatenate([x, x[:1]]) for x in (queries, new))
    mask = create_attention_mask(mx.zeros((3, count, 8)), cache, ring)
    view = appended(cache, new, new)
    attend_by("tiles", view, cache, queries, mask)
    assert seen == [None if count == 1 else "causal"] * 2
    seen.clear()
    attend_by("tiles", view, cache, queries, mask & True)
    assert all(isinstance(x, mx.array) for x in seen) and len(seen) == 2


BAD = {
    "tokens": (lambda b, h, n, t: (n, t + 1), "does not fit"),
    "more tokens": (lambda b, h, n, t: (1, 1, 1, t + 5), "broadcasts to"),
    "queries": (lambda b, h, n, t: (n + 1, t), "does not fit"),
    "heads": (lambda b, h, n, t: (b, h + 1, n, t), "does not fit"),
    "rows": (lambda b, h, n, t: (b + 1, 1, n, t), "does not fit"),
    "axes": (lambda b, h, n, t: (1, 1, 1, n, t), "does not fit"),
}


@pytest.fixture
def layer():
    """An attention of a model, and f(max_kv_size, batch) that makes its cache."""
    model, _ = tiny.load("tiny-qwen3")
    mlx_turboquant_plugin.enable(bypass="identity", window=32)

    def make(ring=None, batch=False):
        cache = mlx_lm_cache.make_prompt_cache(model, ring)[0]
        return (
            cache.merge([cache, mlx_lm_cache.make_prompt_cache(model, ring)[0]]) if batch else cache
        )

    return model.layers[0].self_attn, make


def contents(cache):
    return [cache.size(), *(np.array(x) for x in cache.keys_and_values())]


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("ring", [None, RING])
@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_is_refused_before_the_cache_changes(bad, ring, batch, layer):
    attention, make = layer
    rows, cache = 2 if batch else 1, make(ring, batch)
    width, heads = attention.q_proj.weight.shape[1], attention.n_heads
    attention(mx.random.normal((rows, 60, width)), "causal", cache)
    before = contents(cache)
    for count in (2, 40):
        shape, message = BAD[bad]
        mask = mx.ones(shape(rows, heads, count, 60 + count), mx.bool_)
        with pytest.raises(ValueError, match=message):
            attention(mx.random.normal((rows, count, width)), mask=mask, cache=cache)
    with pytest.raises(ValueError, match="'diagonal'"):
        attention(mx.random.normal((rows, 2, width)), "diagonal", cache)
    for x, y in zip(before, contents(cache)):
        np.testing.assert_array_equal(x, y)
    attention(mx.random.normal((rows, 2, width)), mx.ones((2, 62), mx.bool_), cache)
    assert cache.size() == 62


@pytest.mark.parametrize("filled", [RING, RING + 30])
def test_a_full_ring_refuses_arrays_for_one_query(filled, layer):
    attention, make = layer
    cache, width = make(RING), attention.q_proj.weight.shape[1]
    attention(mx.random.normal((1, filled, width)), cache.make_mask(filled), cache)
    before, one = contents(cache), mx.random.normal((1, 1, width))
    mask = mx.ones((RING,), mx.bool_)
    with pytest.raises(ValueError, match=r"order.*Pass mask=None"):
        attention(one, mask, cache)
    for x, y in zip(before, contents(cache)):
        np.testing.assert_array_equal(x, y)
    attention(one, None, cache)
    # Where nothing sees the mask before, attention itself refuses it.
    queries, new = random(1, HEADS, 1), random(1, KV_HEADS, 1)
    ours = Caches.single((filled,), RING).ours[0]
    with pytest.raises(ValueError, match=r"order.*Pass mask=None"):
        attend_by("tiles", appended(ours, new, new), ours, queries, mask)

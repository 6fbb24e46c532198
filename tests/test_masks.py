"""Attention masks over compressed caches do what they do over mlx-lm's own caches."""

import copy
from dataclasses import dataclass
from typing import Any, Tuple

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.attention import dispatch
from mlx_turboquant_plugin.cache import (
    BatchCompressedKVCache,
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS, KV_HEADS, DIM, RING = 4, 2, 32, 100
SCALE = DIM**-0.5
LOSSLESS = KVCodec(CodecSpec(DIM, DIM, key_codec="exact", value_codec="exact"))
LOSSY = KVCodec(CodecSpec(DIM, DIM))
LEARNED_SINKS = mx.array([0.5, -1.0, 2.0, 0.0])
COUNTS = (1, 5, 40, 300)


def random(*shape):
    return mx.random.normal((*shape, DIM))


@pytest.fixture(params=["tiles", "gpu", "bridge"])
def kernel(request, monkeypatch):
    """What runs the attention; "gpu": what would on a GPU, with MLX's operations."""
    if request.param == "gpu":
        monkeypatch.setattr(dispatch, "_on_gpu", lambda: True)
    return "bridge" if request.param == "bridge" else "eager"


@dataclass
class Pair:
    """mlx-lm's cache and a compressed one, filled alike.

    Attributes:
        left: the padding before each row.
        right: the padding after each row's tokens in the pass to come.
    """

    stock: Any
    ours: Any
    left: Tuple[int, ...] = (0,)
    right: Tuple[int, ...] = (0,)

    def advance(self, count):
        """(keys and values of mlx-lm's cache, what the queries of ours see)."""
        new = random(len(self.left), KV_HEADS, count), random(len(self.left), KV_HEADS, count)
        fetched = self.stock.update_and_fetch(*new)
        self.ours.attending = True
        self.ours.update_and_fetch(*new)
        self.ours.attending = False
        mx.eval(fetched, self.ours.state)
        return fetched, self.ours.view

    def compare(self, count, masks):
        """Attention of the next ``count`` tokens, with each of the masks (mlx-lm's, ours)."""
        queries = random(len(self.left), HEADS, count)
        before = self.ours.size() if any(self.left) else 0
        (keys, values), view = self.advance(count)
        places = np.arange(count)
        valid = np.stack(
            [(before + places >= a) & (places < count - b) for a, b in zip(self.left, self.right)]
        )
        for name, (expected_mask, mask) in masks.items():
            for sinks in (None, LEARNED_SINKS):
                expected = scaled_dot_product_attention(
                    queries, keys, values, None, SCALE, expected_mask, sinks
                )
                self.ours.view = view
                out = dispatch.attend(
                    scaled_dot_product_attention,
                    queries, queries, queries, self.ours, SCALE, mask, sinks,
                )  # fmt: skip
                out, expected = (np.array(x).swapaxes(1, 2) for x in (out, expected))
                assert np.isfinite(out).all(), name
                np.testing.assert_allclose(
                    out[valid], expected[valid], atol=2e-5, err_msg=f"{name}, sinks {sinks}"
                )
        return len(masks) * 2


def single(kernel, invariant, history, ring=None, keep=0, batch=1):
    visibility = Visibility(32, 4, invariant)
    if ring is None:
        pair = Pair(KVCache(), CompressedKVCache(LOSSLESS, visibility, kernel))
    else:
        ours = RotatingCompressedKVCache(ring, keep, LOSSLESS, visibility, kernel)
        pair = Pair(RotatingKVCache(ring, keep), ours)
    pair.left = pair.right = (0,) * batch
    for count in history:
        pair.advance(count)
    pair.ours.view = None
    return pair


def batched(kernel, invariant, histories, ring=None):
    """The batch of sequences that have taken chunks of so many tokens."""
    rows = [single(kernel, invariant, history, ring) for history in histories]
    longest = max(map(sum, histories))
    return Pair(
        rows[0].stock.merge([row.stock for row in rows]),
        rows[0].ours.merge([row.ours for row in rows]),
        tuple(longest - sum(history) for history in histories),
        (0,) * len(rows),
    )


def padded(pair, count):
    """The same before a pass in which rows are padded on the right."""
    lengths = [max(1, count - 7 * row) for row in range(len(pair.left))]
    pair.right = tuple(count - length for length in lengths)
    for cache in (pair.stock, pair.ours):
        cache.prepare(lengths=lengths, right_padding=list(pair.right))
    return pair


def arrays(pair, count, tokens, causal=False):
    """Masks of every shape and kind over ``tokens`` tokens, the newest ``count`` the queries'.

    Padding is hidden, and no query of a token sees nothing.
    """
    places, queries = mx.arange(tokens), mx.arange(tokens - count, tokens)[:, None]
    allowed = places >= mx.array(pair.left)[:, None, None, None]
    allowed = allowed & (places <= (queries if causal else tokens))
    batch, heads = len(pair.left), HEADS
    allowed = mx.broadcast_to(allowed, (batch, heads, count, tokens))
    masks = {}
    for shape in (
        (tokens,),
        (count, tokens),
        (1, 1, 1, tokens),
        (heads, count, tokens),
        (batch, 1, 1, tokens),
        (batch, 1, count, tokens),
        (batch, heads, count, tokens),
    ):
        by_all = (1,) * (4 - len(shape)) + shape
        axes = [axis for axis, size in enumerate(by_all) if size == 1]
        seen = mx.all(allowed, axis=axes, keepdims=True).reshape(shape)
        sure = places == (tokens - count if causal else tokens - 1)
        if count in shape[-2:-1]:
            sure = places == queries
        shown = seen & (sure | (mx.random.uniform(shape=shape) < 0.6))
        masks[f"bool {shape}"] = shown
        masks[f"additive {shape}"] = mx.where(shown, mx.random.normal(shape), -mx.inf)
    return {name: (mask, mask) for name, mask in masks.items()}


def own(pair, count, *windows):
    """The masks that the caches make themselves, as models ask for them."""
    hidden = mx.zeros((len(pair.left), count, 8))
    return {
        f"own, window {window}, array {array}": tuple(
            create_attention_mask(hidden, cache, window, array) for cache in (pair.stock, pair.ours)
        )
        for window in windows
        for array in (False, True)
    }


BY_NAME = {"None": (None, None), "causal": ("causal", "causal")}
# Chunks to fill a cache with: none, too few to have codes, and many.
HISTORIES = ((), (20,), (150, 70, 1, 1))
INVARIANT = pytest.mark.parametrize("invariant", [False, True], ids=["prompts", "invariant"])


@INVARIANT
@pytest.mark.parametrize("history", HISTORIES, ids=sum)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_sequence(batch, history, invariant, kernel):
    for count in COUNTS:
        pair = single(kernel, invariant, history, batch=batch)
        masks = {**BY_NAME, **own(pair, count, None, 20, 120)}
        masks["(1, 1)"] = mx.ones((1, 1), mx.bool_), mx.ones((1, 1), mx.bool_)
        tokens = sum(history) + count
        pair.compare(count, {**masks, **arrays(pair, count, tokens)})


@INVARIANT
@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize(
    "history", [(), (2,), (60,), (40, 59), (40, 60), (150, 40, 1, 1), (250,)], ids=str
)
def test_a_ring(history, keep, invariant, kernel):
    for count in COUNTS:
        pair = single(kernel, invariant, history, RING, keep)
        masks = {**BY_NAME, **own(pair, count, None, RING)}
        if count > 1 or sum(history) < RING:
            tokens = min(RING - 1, sum(history)) + count
            masks.update(arrays(pair, count, tokens))
        pair.compare(count, masks)


RAGGED = ((150, 70, 1), (33,), (6,))
EQUAL = ((100, 30), (100, 30))


@INVARIANT
@pytest.mark.parametrize("right", [False, True], ids=["full", "right-padded"])
@pytest.mark.parametrize("histories", [RAGGED, EQUAL, ((), (), ())], ids=str)
def test_a_batch(histories, right, invariant, kernel):
    for count in COUNTS:
        pair = batched(kernel, invariant, histories)
        if right:
            padded(pair, count)
        masks = own(pair, count, None, 20, 120)
        if not any(pair.left + pair.right):
            masks.update(BY_NAME)
        tokens = pair.ours.size() + count
        pair.compare(count, {**masks, **arrays(pair, count, tokens, causal=right)})
        if right:
            for cache in (pair.stock, pair.ours):
                cache.finalize()
            pair.left = tuple(pair.ours.left_padding.tolist())
            pair.right = (0,) * len(pair.left)
            pair.compare(1, {**own(pair, 1, None, 20), **arrays(pair, 1, tokens + 1)})


@INVARIANT
def test_a_batch_padded_on_the_left(invariant, kernel):
    for count in COUNTS:
        left = (20, 0, 7)
        ours = BatchCompressedKVCache(list(left))
        ours.bind(LOSSLESS, "", kernel, invariant)
        pair = Pair(BatchKVCache(list(left)), ours, left, (0, 0, 0))
        pair.compare(count, {**own(pair, count, None, 20), **arrays(pair, count, count)})
        tokens = count + 30
        pair.compare(30, {**own(pair, 30, None, 20), **arrays(pair, 30, tokens)})


@INVARIANT
@pytest.mark.parametrize("right", [False, True], ids=["full", "right-padded"])
@pytest.mark.parametrize(
    "histories", [((60,), (30,), (5,)), ((150, 1), (60,)), ((150, 1), (120, 90))], ids=str
)
def test_a_batch_of_rings(histories, right, invariant, kernel):
    longest = max(map(sum, histories))
    for count in COUNTS:
        pair = batched(kernel, invariant, histories, RING)
        pair.left = tuple(pair.ours.left_padding.tolist())
        if right:
            padded(pair, count)
        masks = own(pair, count, None, RING, 20)
        if longest < RING:
            masks.update(arrays(pair, count, longest + count, causal=right))
        pair.compare(count, masks)

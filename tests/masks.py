"""mlx-lm's caches and compressed ones side by side, and attention masks for both."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_turboquant_plugin.attention import dispatch
from mlx_turboquant_plugin.backends import support
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS, KV_HEADS, DIM = 4, 2, 32
SCALE = DIM**-0.5
LOSSLESS = KVCodec(CodecSpec(DIM, DIM, key_codec="exact", value_codec="exact"))
LEARNED_SINKS = mx.array([0.5, -1.0, 2.0, 0.0])
# Passes of so many queries take long.
LARGE = 300
# What runs the attention ("gpu": what would on a GPU, with MLX's operations), and whether
# positions alone say what is in full precision.
PATHS = "tiles", "compiled", "gpu", "bridge"
WAYS = [(path, invariant) for path in PATHS for invariant in (False, True)]
# Most that outputs of about 1 may differ.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 6e-3, mx.bfloat16: 5e-2}


def kernel_of(path):
    return path if path in ("bridge", "compiled") else "eager"


def random(*shape):
    return mx.random.normal((*shape, DIM))


def attend_by(path, view, cache, queries, mask, sinks=None):
    """Attention over what ``cache`` holds, which ``view`` is of."""
    cache.view, cache.fetched = view, (queries, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "on_gpu", lambda: path == "gpu")
        return dispatch.attend(
            scaled_dot_product_attention, queries, queries, queries, cache, SCALE, mask, sinks
        )


def appended(cache, keys, values):
    """What the queries of these tokens see."""
    cache.attending = True
    cache.update_and_fetch(keys, values)
    view = cache.view
    cache.attending, cache.view = False, None
    mx.eval(cache.state)
    return view


class Caches:
    """mlx-lm's cache and compressed ones, filled alike.

    Attributes:
        dtype: of queries, keys, values and additive masks.
        ours: the compressed caches, one for each of WAYS.
        left: the padding before each row.
        right: the padding after each row's tokens in the pass to come.
    """

    dtype = mx.float32

    def __init__(self, stock, ours):
        self.stock, self.ours = stock, ours
        self.left = tuple(getattr(ours[0], "left_padding", mx.array([0])).tolist())
        self.right = (0,) * len(self.left)

    @classmethod
    def single(cls, history=(), ring=None, keep=0):
        """Of one sequence, filled with chunks of so many tokens."""
        stock = KVCache() if ring is None else RotatingKVCache(ring, keep)
        ours = []
        for path, invariant in WAYS:
            parts = LOSSLESS, Visibility(32, 4, invariant), kernel_of(path)
            if ring is None:
                ours.append(CompressedKVCache(*parts))
            else:
                ours.append(RotatingCompressedKVCache(ring, keep, *parts))
        caches = cls(stock, ours)
        for count in history:
            caches.advance(count)
        return caches

    @classmethod
    def batch(cls, histories, ring=None):
        """Of sequences that were filled one by one."""
        rows = [cls.single(history, ring) for history in histories]
        stock, *ours = zip(*((row.stock, *row.ours) for row in rows))
        return cls(stock[0].merge(stock), [each[0].merge(each) for each in ours])

    def prepare(self, lengths):
        """Expect rows of so many tokens, padded on the right."""
        self.right = tuple(max(lengths) - length for length in lengths)
        for cache in (self.stock, *self.ours):
            cache.prepare(lengths=lengths, right_padding=list(self.right))

    def finalize(self):
        for cache in (self.stock, *self.ours):
            cache.finalize()
        self.__init__(self.stock, self.ours)

    def advance(self, count):
        """(keys and values of mlx-lm's cache, what the queries of ours see)."""
        new = [random(len(self.left), KV_HEADS, count).astype(self.dtype) for _ in range(2)]
        fetched = self.stock.update_and_fetch(*new)
        mx.eval(fetched)
        return fetched, [appended(cache, *new) for cache in self.ours]

    def compare(self, count, masks):
        """Attention of the next ``count`` tokens under masks: (mlx-lm's, ours: one or each's)."""
        queries = random(len(self.left), HEADS, count).astype(self.dtype)
        before = self.ours[0].size()
        fetched, views = self.advance(count)
        valid = self._valid(before, count)
        for index, (name, (expected_mask, given)) in enumerate(masks.items()):
            given = given if isinstance(given, list) else [given] * len(WAYS)
            expected = {}
            for way, (path, invariant) in enumerate(WAYS):
                # Every path has every mask with learned sinks and without; large ones take
                # long, and take turns.
                learned = (index + way) % 2 == 0
                if count == LARGE and (index + index // 8 + way) % 8:
                    continue
                sinks = LEARNED_SINKS.astype(self.dtype) if learned else None
                if learned not in expected:
                    out = scaled_dot_product_attention(
                        queries, *fetched, None, SCALE, expected_mask, sinks
                    )
                    expected[learned] = rows_of(out)[valid]
                out = attend_by(path, views[way], self.ours[way], queries, given[way], sinks)
                assert out.dtype == self.dtype
                out = rows_of(out)
                where = f"{path}, invariant {invariant}, {count} queries, {name}, {sinks}"
                assert np.isfinite(out).all(), where
                np.testing.assert_allclose(
                    out[valid], expected[learned], atol=TOLERANCE[self.dtype], err_msg=where
                )

    def _valid(self, before, count):
        """Which queries are no padding, bool (B, N)."""
        places = np.arange(count)
        return np.stack(
            [
                (before + places >= left) & (places < count - right)
                for left, right in zip(self.left, self.right)
            ]
        )


def rows_of(out):
    """Outputs by row and query, (B, N, H_q, D)."""
    return np.array(out.astype(mx.float32)).swapaxes(1, 2)


def arrays(caches, count, tokens, causal=False):
    """Masks of every shape and kind over ``tokens`` tokens, the newest ``count`` the queries'.

    Padding is hidden, and no query of a token sees nothing.
    """
    places, queries = mx.arange(tokens), mx.arange(tokens - count, tokens)[:, None]
    allowed = places >= mx.array(caches.left)[:, None, None, None]
    allowed = allowed & (places <= (queries if causal else tokens))
    batch, heads = len(caches.left), HEADS
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
        masks[f"additive {shape}"] = mx.where(shown, mx.random.normal(shape), -mx.inf).astype(
            caches.dtype
        )
    return {name: (mask, mask) for name, mask in masks.items()}


def own(caches, count, *windows):
    """The masks that the caches make themselves, as models ask for them."""
    hidden = mx.zeros((len(caches.left), count, 8))
    made = {}
    for window in windows:
        # Batches always make arrays.
        for array in (False, True)[: 2 - hasattr(caches.stock, "left_padding")]:
            stock, *ours = (
                create_attention_mask(hidden, cache, window, array)
                for cache in (caches.stock, *caches.ours)
            )
            made[f"own, window {window}, array {array}"] = stock, ours
    return made

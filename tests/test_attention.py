"""Attention over compressed caches, against the oracle and against mlx-lm's own."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from mlx_turboquant_plugin import reference
from mlx_turboquant_plugin.attention.dispatch import attend
from mlx_turboquant_plugin.cache import CompressedKVCache, Visibility
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

WINDOW, SINKS = 64, 4
KERNELS = ("eager", "compiled", "bridge")


class Case:
    """Random keys, values and the queries of the last ``count`` of ``length`` tokens."""

    def __init__(
        self, dim=64, groups=2, count=1, length=230, batch=1, dtype=mx.float32, extras=False, **spec
    ):
        mx.random.seed(dim + 10 * groups + 100 * count + length)
        self.heads, self.count, self.length, self.dtype = 2, count, length, dtype
        self.scale = dim**-0.5
        self.bias = self.balance = None
        if extras:
            self.bias = KeyBias(20 * mx.random.normal((2, dim)), nn.RoPE(dim))
            self.balance = mx.exp(0.3 * mx.random.normal((2, 1, dim)))
        self.codec = KVCodec(CodecSpec(dim, dim, **spec), self.balance, self.bias)
        shape = (batch, self.heads, length, dim)
        self.keys, self.values = (mx.random.normal(shape).astype(dtype) for _ in range(2))
        if extras:
            self.keys = (self.keys + self.bias.rotated(0, length)).astype(dtype)
        self.queries = mx.random.normal((batch, 2 * groups, count, dim)).astype(dtype)

    def cache(self, kernel="eager"):
        """A cache that holds the tokens before the queries'."""
        cache = CompressedKVCache(self.codec, Visibility(WINDOW, SINKS), kernel)
        before = self.length - self.count
        if before:
            cache.update_and_fetch(self.keys[:, :, :before], self.values[:, :, :before])
        return cache

    def run(self, kernel="eager", mask="causal", queries=None, learned_sinks=None):
        queries = self.queries if queries is None else queries
        new = slice(self.length - self.count, None)
        mask = None if self.count == 1 and isinstance(mask, str) else mask
        cache = self.cache(kernel)
        new = self.keys[:, :, new], self.values[:, :, new]
        return step(cache, queries, *new, self.scale, mask, learned_sinks)

    def expected(self, learned_sinks=None):
        """The oracle's answer in fp64."""
        decoded = (
            self.codec.decode_keys(self.codec.encode_keys(self.keys, 0), 0),
            self.codec.decode_values(self.codec.encode_values(self.values)),
        )
        arrays = [np.array(x.astype(mx.float32)) for x in (self.queries, self.keys, self.values)]
        positions = np.arange(self.length - self.count, self.length)
        return reference.attention(
            *arrays,
            *map(np.array, decoded),
            positions,
            WINDOW,
            SINKS,
            self.scale,
            learned_sinks=learned_sinks,
        )


def step(cache, queries, keys, values, scale, mask, learned_sinks=None):
    """What a patched attention does: update, then attend."""
    cache.attending = True
    keys, values = cache.update_and_fetch(keys, values)
    out = attend(
        scaled_dot_product_attention, queries, keys, values, cache, scale, mask, learned_sinks
    )
    cache.attending, cache.view = False, None
    return out


def close(ours, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.array(ours.astype(mx.float32)), expected, atol=tolerance)


LLOYD_MAX = [{"key_bits": k, "value_bits": v} for k, v in ((2, 2), (3, 2), (4, 4), (2, 4), (3, 3))]
AFFINE = [
    {"key_codec": "affine", "key_bits": b, "value_codec": "affine", "value_bits": b}
    for b in (2, 4, 8)
]
TABLE = [
    *({"dim": d, "groups": g} for d, g in zip((64, 80, 96, 112, 128, 256), (1, 2, 4, 8, 2, 1))),
    *({"dim": d, "groups": 3, "count": 33} for d in (64, 80, 96, 112, 128, 256)),
    *({"count": n, "length": t} for n in (1, 5, 33, 200) for t in (201, 500, 1100)),
    *({"length": t} for t in (2, 5, 67, 68, 69, 96, 97, 128, 129)),
    *({**spec, "count": n} for spec in (*LLOYD_MAX, *AFFINE) for n in (1, 40)),
    *({"extras": True, "dim": d, "count": n} for d in (64, 80) for n in (1, 70)),
    *({"extras": True, "count": n, "length": 600, **AFFINE[1]} for n in (1, 70)),
    {"batch": 2, "count": 40, "extras": True},
    {"batch": 3, "groups": 8},
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", TABLE, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items())
)
def test_every_kernel_is_the_oracle(case, kernel):
    case = Case(**case)
    # The bias makes scores of several hundred, whose rounding is e^3e-5 in fp32.
    close(case.run(kernel), case.expected(), 2e-5 if case.bias is None else 2e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 2e-3), (mx.bfloat16, 1.6e-2)])
def test_half_precision_is_rounded_once_at_the_end(dtype, tolerance, count, kernel):
    case = Case(dtype=dtype, count=count)
    out = case.run(kernel)
    assert out.dtype == dtype
    close(out, case.expected(), tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize("shape", ["NT", "B1NT", "BHNT"])
@pytest.mark.parametrize("additive", [False, True])
def test_array_masks(additive, shape, count, kernel):
    case = Case(count=count, batch=2)
    full = {"NT": (), "B1NT": (2, 1), "BHNT": (2, 4)}[shape] + (count, case.length)
    mask = mx.random.uniform(shape=full) < 0.7
    # Every query sees itself, so that no row is empty.
    mask = mask | (mx.arange(case.length) == mx.arange(case.length - count, case.length)[:, None])
    given = mx.where(mask, 0.0, -mx.inf) if additive else mask
    out = case.run(kernel, mask=given)
    decoded = (
        case.codec.decode_keys(case.codec.encode_keys(case.keys, 0), 0),
        case.codec.decode_values(case.codec.encode_values(case.values)),
    )
    keys, values, dk, dv = (
        np.repeat(np.array(x), 2, axis=1) for x in (case.keys, case.values, *decoded)
    )
    positions = np.arange(case.length - count, case.length)
    exact = reference.reads_exactly(positions, np.arange(case.length), WINDOW, SINKS)
    q = np.array(case.queries)
    scores = np.where(exact, q @ keys.swapaxes(-1, -2), q @ dk.swapaxes(-1, -2)) * case.scale
    scores = np.where(np.array(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    close(out, (weights * exact) @ values + (weights * ~exact) @ dv)


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_query_that_sees_nothing_stays_a_number(count, kernel):
    case = Case(count=count)
    mask = mx.zeros((count, case.length), mx.bool_)
    assert mx.all(mx.isfinite(case.run(kernel, mask=mask))).item()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length, count", [(5, 5), (60, 1), (68, 20), (96, 1)])
def test_before_anything_is_quantized_it_is_mlx_lms_own_answer_bit_for_bit(length, count, kernel):
    case = Case(length=length, count=count)
    cache = case.cache(kernel)
    out = case.run(kernel)
    assert cache.quantized == 0
    expected = scaled_dot_product_attention(
        case.queries,
        case.keys,
        case.values,
        cache=None,
        scale=case.scale,
        mask="causal" if count > 1 else None,
    )
    assert mx.array_equal(out, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 40, 300])
def test_the_identity_bypass_is_plain_attention(count, kernel):
    case = Case(count=count, length=400, extras=True, key_codec="exact", value_codec="exact")
    expected = mx.fast.scaled_dot_product_attention(
        case.queries, case.keys, case.values, scale=case.scale, mask="causal"
    )
    close(case.run(kernel), np.array(expected), 2e-3)


def test_eager_and_compiled_round_alike():
    case = Case(length=900, extras=True)
    close(case.run("eager"), np.array(case.run("compiled")), 1e-4)


def test_one_trace_serves_a_thousand_tokens(traced):
    case = Case(dim=32, length=300, key_bits=2, value_bits=2)
    cache = case.cache("compiled")
    traces = []
    for _ in range(1000):
        token = mx.random.normal((1, 2, 1, 32))
        mx.eval(step(cache, case.queries, token, token, case.scale, None))
        traces.append(len(traced))
    assert cache.offset == 1299
    # rotate, begin, fold with and without a mask, finish: all in the first step.
    assert traces[-1] == traces[0] > 0


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
def test_head_dims_do_not_mix_within_a_process(kernel):
    for dim in (64, 128, 64, 80, 128):
        case = Case(dim=dim)
        close(case.run(kernel), case.expected())


def test_keys_and_values_may_have_different_dims():
    mx.random.seed(0)
    codec = KVCodec(CodecSpec(128, 64))
    cache = CompressedKVCache(codec, Visibility(WINDOW, SINKS), "compiled")
    plain = KVCache()
    keys, values = mx.random.normal((1, 2, 300, 128)), mx.random.normal((1, 2, 300, 64))
    queries = mx.random.normal((1, 4, 300, 128))
    out = step(cache, queries, keys, values, 128**-0.5, "causal")
    keys, values = plain.update_and_fetch(keys, values)
    expected = scaled_dot_product_attention(
        queries, keys, values, cache=plain, scale=128**-0.5, mask="causal"
    )
    assert out.shape == (1, 4, 300, 64)
    assert mx.mean(mx.square(out - expected)).item() < 1e-3 * mx.mean(mx.square(values)).item()


@pytest.mark.parametrize("trim", [100, 150, 190])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [1, 20])
def test_after_a_long_trim_recent_tokens_are_read_through_their_codes(count, kernel, trim):
    case = Case(length=300)
    cache = case.cache(kernel)
    cache.trim(trim)
    keys, values = cache.keys_and_values()
    new = [mx.random.normal((1, 2, count, 64)) for _ in range(2)]
    queries = mx.random.normal((1, 4, count, 64))
    out = step(cache, queries, *new, case.scale, "causal" if count > 1 else None)
    keys, values = (mx.concatenate(pair, axis=2) for pair in zip((keys, values), new))
    expected = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=case.scale, mask="causal"
    )
    close(out, np.array(expected))


# Scores of about 1 and more: no weight at all, some of it, nearly all of it.
LEARNED = mx.array([-50.0, 0.0, 3.0, 9.0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [{}, {"count": 40}, {"length": 60}, {"count": 9, "extras": True}])
def test_learned_sinks_take_their_share_of_the_weight(case, kernel):
    case = Case(**case)
    out, expected = case.run(kernel, learned_sinks=LEARNED), case.expected(np.array(LEARNED))
    close(out, expected, 2e-5 if case.bias is None else 2e-3)
    assert np.abs(expected - case.expected()).max() > 0.01


def test_learned_sinks_of_a_batch():
    cases = Case(), Case(length=150), Case(length=40)
    batch = CompressedKVCache.merge([case.cache() for case in cases])
    last = [[x[:, :, -1:] for x in (c.queries, c.keys, c.values)] for c in cases]
    queries, keys, values = (mx.concatenate(rows) for rows in zip(*last))
    mask = batch.make_mask(1)
    out = step(batch, queries, keys, values, cases[0].scale, mask, LEARNED)
    for row, case in zip(out, cases):
        close(row[None], case.expected(np.array(LEARNED)))


@pytest.mark.parametrize("left, count, sinks", [(18, 1, 0), (1, 3, 0), (513, 3, 4)])
def test_a_single_token_in_full_precision_or_in_a_piece_of_codes(left, count, sinks):
    """MLX's shapeless functions crash with a single score, see attention/pieces.py."""
    case = Case(count=count, length=800)
    new = case.keys[:, :, -count:], case.values[:, :, -count:]
    outs = []
    for kernel in ("eager", "compiled"):
        cache = CompressedKVCache(case.codec, Visibility(WINDOW, sinks), kernel)
        cache.update_and_fetch(case.keys, case.values)
        cache.trim(800 - left)
        mask = "causal" if count > 1 else None
        outs.append(step(cache, case.queries, *new, case.scale, mask))
    np.testing.assert_allclose(*outs, atol=1e-5)


def test_other_caches_are_left_alone():
    calls = []
    attend(lambda *args, **kwargs: calls.append((args, kwargs)), 1, 2, 3, KVCache(), 0.5, None)
    assert calls[0][0] == (1, 2, 3) and isinstance(calls[0][1]["cache"], KVCache)

"""The Metal kernels in the emulator: the selftest's table, and what it leaves out."""

import emulator
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from layouts import layout
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import scaled_dot_product_attention

import mlx_turboquant_plugin
from mlx_turboquant_plugin import backends
from mlx_turboquant_plugin.attention.dispatch import attend
from mlx_turboquant_plugin.attention.fused import Problem, attend_fused
from mlx_turboquant_plugin.backends import backend, support
from mlx_turboquant_plugin.backends.inputs import DEVICE_SIZE
from mlx_turboquant_plugin.backends.metal import launch as metal
from mlx_turboquant_plugin.backends.support import unsupported
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from mlx_turboquant_plugin.cache.copies import detached
from mlx_turboquant_plugin.cache.full_precision import FullPrecisionTokens
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.tools.cases import QUICK, table
from mlx_turboquant_plugin.tools.selftest import check

pytestmark = pytest.mark.skipif(
    emulator.unavailable() is not None, reason=str(emulator.unavailable())
)

# Schedule, poison and the most splits. Schedules from 2 on are random orders; with one split
# each simdgroup has several tiles.
RUNS = [(0, 0, 64), (1, 1, 1), (2, 0, 64), (3, 1, 1)]
VISIBILITY = Visibility(window=64, sinks=4)


@pytest.fixture(params=RUNS, ids=lambda run: "schedule{}-poison{}-splits{}".format(*run))
def emulated(request, monkeypatch):
    metal.kernel.cache_clear()
    schedule, poison, splits = request.param
    monkeypatch.setattr(metal, "MAX_SPLITS", splits)
    with emulator.patch(mode="checked", schedule=schedule, poison=poison):
        yield
    metal.kernel.cache_clear()


one_run = pytest.mark.parametrize("emulated", RUNS[3:], indirect=True)


def verify(case, monkeypatch):
    # Where prompts are dequantized.
    monkeypatch.setattr(support, "on_gpu", lambda: True)
    result = check(case, "metal")
    assert result.ok, f"{case}: error {result.error:.1e} of {result.tolerance:.1e} {result.note}"


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_table(case, emulated, monkeypatch):
    verify(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(table(everything=True))[len(QUICK) :], ids=str)
def test_the_whole_table(case, emulated, monkeypatch):
    verify(case, monkeypatch)


def step(cache, queries, keys, values, kernel, mask):
    """What attention by one of the kernels gives, with the same codes."""
    cache.backend = backend(kernel)
    cache.attending = True
    new = cache.update_and_fetch(keys, values)
    out = attend(
        scaled_dot_product_attention, queries, *new, cache, queries.shape[-1] ** -0.5, mask
    )
    mx.eval(out)
    return out


def agrees_with_eager(cache, count, mask, dim=64):
    """Whether a step on two copies of a cache comes to the same by two kernels."""
    queries = mx.random.normal((1, 6, count, dim))
    keys, values = mx.random.normal((2, 1, 2, count, dim))
    ours, expected = (
        step(copy, queries, keys, values, kernel, mask)
        for copy, kernel in ((detached(cache), "metal"), (detached(cache), "eager"))
    )
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-4)


def filled(cache, length, dim=64, chunk=50):
    for start in range(0, length, chunk):
        shape = (1, 2, min(chunk, length - start), dim)
        cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
    return cache


def codec(dim=64, biased=False):
    mx.random.seed(dim)
    bias = KeyBias(10 * mx.random.normal((2, dim)), nn.RoPE(dim)) if biased else None
    return KVCodec(CodecSpec(dim, dim), bias=bias)


@pytest.mark.parametrize("trim", [1, 100, 133, 190])
@pytest.mark.parametrize("count", [1, 3])
@one_run
def test_after_a_trim_codes_end_anywhere(trim, count, emulated):
    cache = filled(CompressedKVCache(codec(), VISIBILITY), 300)
    cache.trim(trim)
    agrees_with_eager(cache, count, "causal" if count > 1 else None)


@pytest.mark.parametrize("size, keep", [(200, 4), (150, 0), (131, 7)])
@pytest.mark.parametrize("length", [140, 301, 420])
@pytest.mark.parametrize("count", [1, 6])
@one_run
def test_rings_forget(size, keep, length, count, emulated):
    cache = RotatingCompressedKVCache(size, keep, codec(biased=True), VISIBILITY)
    cache = filled(cache, length)
    agrees_with_eager(cache, count, cache.make_mask(count))


def problem(quantized, count=1, dim=64):
    """A problem with so many codes, made by hand."""
    one = codec(dim)
    shape = (1, 1, 8, dim)
    keys, values = mx.random.normal((2, *shape))
    key_codes = value_codes = ()
    if quantized:
        tokens = mx.random.normal((1, 1, quantized, dim))
        key_codes, value_codes = one.encode_keys(tokens, 0), one.encode_values(tokens)
    bounds = mx.array([[[0, 0, 0, 8]] * count])
    queries = mx.random.normal((1, 1, count, dim))
    return Problem(
        one,
        queries,
        FullPrecisionTokens(keys, values),
        0,
        key_codes,
        value_codes,
        0,
        bounds,
        dim**-0.5,
        None,
        {},
    )


@pytest.mark.parametrize("quantized", [0, 1, 2, 5, 31, 127, 128, 129])
@one_run
def test_any_number_of_codes(quantized, emulated):
    given = problem(quantized)
    keys, values = given.full_tokens.keys, given.full_tokens.values
    if quantized:
        keys = mx.concatenate([given.codec.decode_keys(given.key_codes, 0), keys], axis=2)
        values = mx.concatenate([given.codec.decode_values(given.value_codes), values], axis=2)
    expected = mx.fast.scaled_dot_product_attention(given.queries, keys, values, scale=given.scale)
    np.testing.assert_allclose(np.array(metal.attend(given)), np.array(expected), atol=1e-5)


@one_run
def test_launches_and_compilations(emulated, monkeypatch):
    """Three launches for a prompt's pass, two a step, and two more for 32 tokens; all lengths
    share their kernels."""
    launches, variants = [], set()
    original = mx.fast.metal_kernel

    def counted(**settings):
        kernel = original(**settings)

        def call(**launch):
            launches.append(settings["name"])
            inputs = [(x.dtype, x.ndim, x.size < DEVICE_SIZE) for x in launch["inputs"]]
            variants.add((settings["name"], *inputs, *map(tuple, launch["template"])))
            return kernel(**launch)

        return call

    expected = ["turboquant_dequantize"] + ["turboquant_encode"] * 2
    # Undone before the emulator puts MLX's own function back.
    with monkeypatch.context() as patched:
        patched.setattr(mx.fast, "metal_kernel", counted)
        cache = filled(CompressedKVCache(codec(), VISIBILITY, "metal"), 159, chunk=159)
        for length in range(160, 256):
            queries, (keys, values) = (
                mx.random.normal((1, 6, 1, 64)),
                mx.random.normal((2, 1, 2, 1, 64)),
            )
            step(cache, queries, keys, values, "metal", None)
            # The newest token is the first of a block.
            if length % 32 == 1:
                expected += ["turboquant_encode"] * 2
            expected += ["turboquant_decode", "turboquant_merge"]
    assert launches == expected
    assert len(variants) == 5


@pytest.mark.parametrize("chunk", [50, 300])
def test_whole_buffers_are_passed(chunk, monkeypatch):
    """MLX copies inputs that are not contiguous on every call."""
    monkeypatch.setattr(backend("metal"), "attend", lambda problem: problem)
    cache = filled(CompressedKVCache(codec(), VISIBILITY), 300, chunk=chunk)
    view = cache.append(*mx.random.normal((2, 1, 2, 1, 64)))
    view = view._replace(backend=backend("metal"))
    given = attend_fused(mx.random.normal((1, 6, 1, 64)), view, 1.0, None)
    full = given.full_tokens
    for array in (full.keys, full.values, *given.key_codes, *given.value_codes):
        assert np.array(array, copy=False).flags.c_contiguous


@pytest.mark.parametrize(
    "spec, dtype, named",
    [
        (CodecSpec(64, 64, key_codec="exact"), mx.float32, "the exact codec"),
        (CodecSpec(16, 64), mx.float32, "head dim of 16"),
        (CodecSpec(64, 320), mx.float32, "head dim of 320"),
        (CodecSpec(40, 64, "segmented"), mx.float32, "a multiple of 16"),
    ],
)
def test_what_is_not_supported_is_named(spec, dtype, named):
    keys = mx.zeros((1, 1, 8, spec.head_dim), dtype)
    values = mx.zeros((1, 1, 8, spec.value_dim), dtype)
    bounds = mx.zeros((1, 1, 4), mx.int32)
    full = FullPrecisionTokens(keys, values)
    given = Problem(KVCodec(spec), keys[:, :, :1], full, 0, (), (), 0, bounds, 1.0, None, {})
    assert named in unsupported(given)


@one_run
def test_models_generate_with_it(tiny_model, emulated, monkeypatch):
    model, tokens = tiny_model
    monkeypatch.setattr(backends.backend("metal"), "runs_here", lambda: True)
    results = []
    for kernel in ("metal", "eager"):
        mlx_turboquant_plugin.enable(kernel=kernel)
        caches = mlx_lm_cache.make_prompt_cache(model)
        tiny.logits(model, tokens[:, :400], caches)
        assert {cache.kernel for cache in caches} == {kernel}
        results.append(tiny.logits(model, tokens[:, 400:], caches, chunk=5)[0])
        mlx_turboquant_plugin.disable()
    # Logits are fp32: rounding alone comes to 1e-7.
    assert tiny.mean_kl(*results) < 1e-6


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("start, length", [(0, 45), (1000, 7)])
@one_run
def test_codes_are_those_of_the_codec(dim, bits, start, length, emulated):
    mx.random.seed(dim)
    rope = nn.RoPE(dim // bits * 2, traditional=bits == 2)
    bias = KeyBias(10 * mx.random.normal((2, dim)), rope) if bits != 4 else None
    balance = mx.exp(0.3 * mx.random.normal((2, 1, dim))) if bits != 3 else None
    one = KVCodec(CodecSpec(dim, dim, key_bits=bits, value_bits=bits), balance, bias)
    dtype = {2: mx.float16, 3: mx.bfloat16, 4: mx.float32}[bits]
    sizes = mx.exp(mx.random.normal((2, 2, length, 1)))
    x = (sizes * mx.random.normal((2, 2, length, dim))).astype(dtype)
    for ours, expected in (
        (metal.encode_keys(one, x, start), one.encode_keys(x, start)),
        (metal.encode_values(one, x), one.encode_values(x)),
    ):
        are_like(ours, expected)


def are_like(ours, expected):
    assert len(ours) == len(expected)
    for plane, other in zip(ours, expected):
        assert plane.dtype == other.dtype and plane.shape == other.shape
        # A code can flip at a threshold by rounding, and with a size all codes of a vector.
        assert mx.mean(plane != other).item() < 0.01


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("length", [45, 7])
@one_run
def test_segmented_codes_are_those_of_the_codec(dim, length, emulated):
    mx.random.seed(dim)
    cut = bias = balance = squares = None
    if dim != 192:
        cut = layout(3, dim)
        bias = KeyBias(10 * mx.random.normal((3, dim)), nn.RoPE(dim // 2, traditional=dim == 80))
        balance = mx.exp(0.3 * mx.random.normal((3, 1, dim)))
        squares = mx.exp(mx.random.normal((3, dim)))
    one = KVCodec(CodecSpec(dim, dim, "segmented", 4), balance, bias, cut, squares)
    sizes = mx.exp(mx.random.normal((2, 3, length, 1)))
    x = sizes * mx.random.normal((2, 3, length, dim))
    are_like(metal.encode_keys(one, x, 1000), one.encode_keys(x, 1000))


@pytest.mark.parametrize("x", [0.0, 1e-30, 1e30, [3.0] + 63 * [0.0]], ids=str)
@one_run
def test_codes_of_extremes(x, emulated):
    one = codec()
    spec = CodecSpec(64, 64, "segmented", 4)
    cut = KVCodec(spec, layout=layout(3, 64), query_squares=mx.ones((3, 64)))
    x = mx.broadcast_to(mx.array(x), (1, 3, 3, 64))
    pairs = [
        *zip(metal.encode_values(one, x), one.encode_values(x)),
        *zip(metal.encode_keys(cut, x, 0), cut.encode_keys(x, 0)),
    ]
    for ours, expected in pairs:
        np.testing.assert_array_equal(np.array(ours), np.array(expected))

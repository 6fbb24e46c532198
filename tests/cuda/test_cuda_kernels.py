"""The CUDA kernels on the CPU: the selftest's table, and codes of all kinds."""

import cuda_emulator
import dequantized
import mlx.core as mx
import mlx.nn as nn
import pytest
from layouts import layout

from mlx_turboquant_plugin.attention import fused
from mlx_turboquant_plugin.backends import support
from mlx_turboquant_plugin.backends.cuda import attend as cuda
from mlx_turboquant_plugin.backends.cuda import encode as cuda_encode
from mlx_turboquant_plugin.backends.cuda import portable as cuda_portable
from mlx_turboquant_plugin.backends.cuda import source as cuda_source
from mlx_turboquant_plugin.cache.passes import plan_step, plan_view
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec
from mlx_turboquant_plugin.codecs.segmented import FIRST_BITS
from mlx_turboquant_plugin.tools.cases import QUICK
from mlx_turboquant_plugin.tools.selftest import check

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="needs g++ 12 or clang (apt-get install g++)"
)

# Threads in either order; codes in many splits, and all in one.
RUNS = [(False, 256), (True, 1)]


@pytest.fixture(params=RUNS, ids=["ascending", "descending"])
def emulated(request, monkeypatch):
    descending, splits = request.param
    kernels = (
        # Plans keep launches.
        plan_step,
        plan_view,
        fused._plan_of_rows,
        cuda._attention,
        cuda._split_kernel,
        cuda._merge_kernel,
        cuda._code_splits,
        cuda_encode._encode_kernel,
        cuda_portable.kernel,
    )
    monkeypatch.setattr(cuda_source, "kernel", cuda_emulator.EmulatedKernel)
    monkeypatch.setattr(cuda_emulator.EmulatedKernel, "descending", descending)
    monkeypatch.setattr(cuda, "MOST_SPLITS", splits)
    # An emulated kernel needs numbers, which are not there while a function is traced.
    mx.disable_compile()
    for kernel in kernels:
        kernel.cache_clear()
    yield
    for kernel in kernels:
        kernel.cache_clear()
    mx.enable_compile()


one_run = pytest.mark.parametrize("emulated", RUNS[1:], ids=["descending"], indirect=True)


# Prompts take longest here, and threads of their kernels share least.
TABLE = [(run, case) for run in RUNS for case in QUICK if run is RUNS[1] or case.count <= 8]


@pytest.mark.parametrize("emulated, case", TABLE, indirect=["emulated"], ids=str)
def test_the_table(case, emulated, monkeypatch):
    # Where prompts are dequantized.
    monkeypatch.setattr(support, "on_gpu", lambda: True)
    result = check(case, "cuda")
    assert result.ok, f"{case}: error {result.error:.1e} of {result.tolerance:.1e} {result.note}"


@pytest.mark.parametrize("case", dequantized.CASES, ids=str)
@one_run
def test_what_is_dequantized(case, emulated):
    dequantized.check(case, "cuda")


@pytest.mark.parametrize("chunks, settings", dequantized.PASSES, ids=str)
@one_run
def test_prompts_come_to_what_they_do_by_operations(chunks, settings, emulated, monkeypatch):
    dequantized.check_passes(chunks, settings, "cuda", monkeypatch)


@one_run
def test_short_rows_of_a_pass(emulated, monkeypatch):
    dequantized.check_short_rows("cuda", monkeypatch)


ENCODED_DIMS = (32, 40, 64, 80, 96, 128, 256, 512)


def vectors(*shape, dtype=mx.float32):
    """Vectors of many lengths."""
    return (mx.exp(mx.random.normal((*shape[:-1], 1))) * mx.random.normal(shape)).astype(dtype)


def codec(dim, bits, balanced=False, biased=False, keys="lloyd-max", heads=2):
    """Segments are those of sorted keys, and errors in them are fed back."""
    balance = mx.exp(0.3 * mx.random.normal((heads, 1, dim))) if balanced else None
    bias = KeyBias(10 * mx.random.normal((heads, dim)), nn.RoPE(dim)) if biased else None
    of_segments = ()
    if keys == SEGMENTED:
        of_segments = layout(heads, dim), mx.exp(mx.random.normal((heads, dim)))
    return KVCodec(CodecSpec(dim, dim, keys, bits, value_bits=bits), balance, bias, *of_segments)


def check_codes(one, keys, values, start):
    pairs = zip(cuda_encode.encode(one, keys, values, start), one.encode(keys, values, start))
    for axis, (ours, expected) in zip((-2, -1), pairs):
        assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in expected]
        differs = sum(mx.any(x != y, axis=axis) for x, y in zip(ours, expected)) > 0
        # By rounding a number can be on the other side of a threshold, in one vector of
        # thousands, and that can decide for another size, which changes all codes.
        assert mx.sum(differs).item() <= max(1, differs.size // 100)


@pytest.mark.parametrize("dim", ENCODED_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_the_codec(dim, bits, emulated):
    mx.random.seed(dim)
    one = codec(dim, bits, balanced=bits != 3, biased=bits != 4)
    dtype = {2: mx.float16, 3: mx.bfloat16, 4: mx.float32}[bits]
    for batch, length, start in ((2, 1, 5), (1, 31, 0), (1, 32, 96), (2, 33, 1000), (1, 70, 127)):
        keys, values = (vectors(batch, 2, length, dim, dtype=dtype) for _ in range(2))
        check_codes(one, keys, values, start)


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 128, 256, 512])
def test_codes_of_segments(dim, emulated):
    mx.random.seed(dim)
    heads = len(FIRST_BITS)
    one = codec(dim, 4, balanced=True, biased=dim % 64 == 0, keys=SEGMENTED, heads=heads)
    for batch, length, start in ((2, 1, 5), (1, 32, 96), (2, 33, 1000)):
        check_codes(one, *(vectors(batch, heads, length, dim) for _ in range(2)), start)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("codec_of_keys", ["lloyd-max", SEGMENTED])
@one_run
def test_codes_of_every_kind_of_layer(dtype, balanced, biased, codec_of_keys, emulated):
    mx.random.seed(0)
    keys, values = (vectors(2, 2, 37, 64, dtype=dtype) for _ in range(2))
    check_codes(codec(64, 4, balanced, biased, codec_of_keys), keys, values, 3)


LAYOUTS = {
    "part": lambda x: x[:, :, 4:37],
    "tokens before heads": lambda x: x.swapaxes(1, 2),
    "channels before tokens": lambda x: x.swapaxes(2, 3),
    "every second": lambda x: x[:, :, ::2, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@one_run
def test_codes_of_parts_of_arrays(layout, emulated):
    mx.random.seed(0)
    shapes = {
        "tokens before heads": (2, 40, 2, 80),
        "channels before tokens": (2, 2, 80, 40),
        "every second": (2, 2, 80, 160),
    }
    arrays = (vectors(*shapes.get(layout, (2, 2, 40, 80)), dtype=mx.float16) for _ in range(2))
    check_codes(codec(80, 3, balanced=True), *map(LAYOUTS[layout], arrays), 0)


@pytest.mark.parametrize("x", [0.0, 1e-30, 1e30, [3.0] + 63 * [0.0]], ids=str)
@pytest.mark.parametrize("bits, keys", [(3, "lloyd-max"), (4, SEGMENTED)])
@one_run
def test_codes_of_extremes(x, bits, keys, emulated):
    one = codec(64, bits, keys=keys, heads=3)
    x = mx.broadcast_to(mx.array(x), (1, 3, 3, 64))
    for ours, expected in zip(cuda_encode.encode(one, x, x, 0), one.encode(x, x, 0)):
        for plane, right in zip(ours, expected):
            assert mx.array_equal(plane, right)


@pytest.mark.parametrize("before, length", [(32, 32), (64, 96), (37, 32), (32, 5), (300, 1)])
@pytest.mark.parametrize(
    "bits, keys", [(2, "lloyd-max"), (3, "lloyd-max"), (4, "lloyd-max"), (4, SEGMENTED)]
)
@one_run
def test_codes_after_older_ones(bits, keys, before, length, emulated, monkeypatch):
    """Copied by several blocks, 16 bytes or one at a time."""
    monkeypatch.setattr(cuda_encode, "COPIED", 1000)
    mx.random.seed(before)
    one = codec(80, bits, keys=keys)
    x = vectors(2, 2, before + length, 80)
    older, newer = x[:, :, :before], x[:, :, before:]
    ours = cuda_encode.encode(one, newer, newer, before, cuda_encode.encode(one, older, older, 0))
    whole = cuda_encode.encode(one, x, x, 0)
    part = cuda_encode.encode(
        one, x, x, before, cuda_encode.encode(one, x, x, 0, part=slice(before)), slice(before, None)
    )
    for codes in (ours, part):
        for side, expected in zip(codes, whole):
            assert all(mx.array_equal(*pair) for pair in zip(side, expected))


@pytest.mark.parametrize("sides", [("lloyd-max", "affine"), ("affine", "lloyd-max")], ids=str)
@pytest.mark.parametrize("rope", ["traditional", "partial"])
@one_run
def test_one_side_alone(sides, rope, emulated):
    mx.random.seed(3)
    rotary = nn.RoPE(64, traditional=True) if rope == "traditional" else nn.RoPE(32)
    bias = KeyBias(10 * mx.random.normal((2, 64)), rotary)
    one = KVCodec(CodecSpec(64, 80, sides[0], 3, sides[1], 4), bias=bias)
    check_codes(one, vectors(2, 2, 40, 64), vectors(2, 2, 40, 80), 200)


@pytest.mark.parametrize("name, dim", [("affine", 64), ("lloyd-max", 16), ("lloyd-max", 320)])
def test_other_codes_are_made_by_the_codec(name, dim):
    one = KVCodec(CodecSpec(dim, dim, key_codec=name, value_codec=name))
    check_codes(one, vectors(1, 2, 5, dim), vectors(1, 2, 5, dim), 0)


@pytest.mark.parametrize("bits", [3, 4])
@one_run
def test_one_launch_for_keys_and_values(bits, emulated, monkeypatch):
    launches, call = [], cuda_emulator.EmulatedKernel.__call__

    def counted(self, **launch):
        launches.append((self.name, launch["inputs"]))
        return call(self, **launch)

    monkeypatch.setattr(cuda_emulator.EmulatedKernel, "__call__", counted)
    one, (keys, values) = codec(64, bits, balanced=True), mx.random.normal((2, 1, 2, 70, 64))
    cuda_encode.encode(one, keys, values, 70, one.encode(keys, values, 0))
    ((name, inputs),) = launches
    assert name == "encode"
    # As they are given, so no operation of MLX came before.
    assert any(x is keys for x in inputs) and any(x is values for x in inputs)

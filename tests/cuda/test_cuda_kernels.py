"""The CUDA kernels on the CPU: the selftest's table."""

import cuda_emulator
import mlx.core as mx
import pytest

from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.evaluation.selftest import QUICK, check, serves
from mlx_turboquant_plugin.kernels import cuda

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="needs g++ 12 or clang (apt-get install g++)"
)

SERVED = [case for case in QUICK if serves("cuda", case)]


# Threads in either order; codes in many parts, and all in one.
@pytest.fixture(params=[(False, 256), (True, 1)], ids=["ascending", "descending"])
def emulated(request, monkeypatch):
    descending, parts = request.param
    kernels = (cuda._encode_kernel, cuda._split_kernel, cuda._merge_kernel, cuda._code_parts)
    monkeypatch.setattr(cuda, "_kernel", cuda_emulator.EmulatedKernel)
    monkeypatch.setattr(cuda_emulator.EmulatedKernel, "descending", descending)
    monkeypatch.setattr(cuda, "MOST_PARTS", parts)
    for kernel in kernels:
        kernel.cache_clear()
    yield
    for kernel in kernels:
        kernel.cache_clear()


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_table(case, emulated):
    result = check(case, "cuda")
    assert result.ok, f"{case}: error {result.error:.1e} of {result.tolerance:.1e} {result.note}"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [80, 128])
def test_the_encoder_finds_the_codes_of_the_codec(dim, bits, emulated):
    x = mx.random.normal((2, 3, 5, dim)) * mx.exp(4 * mx.random.normal((2, 3, 5, 1)))
    x[0, 0, 0] = 0
    one = KVCodec(CodecSpec(dim, dim, key_bits=bits, value_bits=bits))
    for ours, expected in (
        (cuda.encode_keys(one, x, 0), one.encode_keys(x, 0)),
        (cuda.encode_values(one, x), one.encode_values(x)),
    ):
        assert len(ours) == len(expected)
        assert all(mx.array_equal(*pair) for pair in zip(ours, expected))

"""The fused attention kernel for NVIDIA GPUs (compute capability 8.0 and later), and the encoder."""

import functools
import math
import zlib
from importlib.resources import files
from typing import TYPE_CHECKING, Callable, List, Optional, Tuple

import mlx.core as mx
import numpy as np

from ..codecs import packing
from ..codecs.kv_codec import Codes, KVCodec
from ..codecs.lloyd_max import CODEBOOKS
from . import unsupported

if TYPE_CHECKING:
    from ..attention.fused import Problem

# Threads of a block in split.cu and merge.cu, and exact tokens of a part.
SPLIT_THREADS, MERGE_THREADS = 128, 512
EXACT_PART = 64

# Blocks of the first launch that run at once on each of the 132 multiprocessors of an
# H100 or H200; MLX does not tell how many there are.
BLOCKS = 4
ROOM = 132 * BLOCKS

MOST_PARTS = 256
CODECS = ("lloyd-max",)


def supports(problem: "Problem") -> Optional[str]:
    """None, or what the kernel can't do about ``problem``, in words."""
    return unsupported(problem, CODECS)


def attend(problem: "Problem") -> mx.array:
    """Attention in two launches: (B, H_q, N, D_v) in the dtype of the queries."""
    codec, spec = problem.codec, problem.codec.spec
    batch, query_heads, count, dim = problem.queries.shape
    heads, exact = problem.keys.shape[1:3]
    group = query_heads // heads
    key_codes, value_codes = problem.key_codes, problem.value_codes
    coded = key_codes[-1].shape[-1]

    tiles_of_rows = 1 if group * count <= 4 or max(dim, spec.value_dim) > 128 else 2
    tile = 64 if tiles_of_rows == 1 and max(dim, spec.value_dim) <= 128 else 32
    chunks = -(-group * count // (4 * tiles_of_rows))
    exact_parts = -(-exact // EXACT_PART)
    parts = exact_parts + _code_parts(batch * heads * chunks, -(-coded // tile))

    bias = rotation = codec.key_rotation.array
    if codec.bias is not None and coded:
        q = problem.queries.astype(mx.float32).reshape(batch, heads, group * count, dim)
        bias = codec.bias.scores(codec.bias.coefficients(q), problem.first_coded, coded)
    options = (
        ("DIM", dim),
        ("VALUE_DIM", spec.value_dim),
        ("KEY_BITS", spec.key_bits),
        ("VALUE_BITS", spec.value_bits),
        ("NT", tiles_of_rows),
        ("TILE", tile),
        ("WHOLE_TILES", coded % 32 == 0),
        ("BALANCED", codec.balance is not None),
        ("BIASED", codec.bias is not None),
        ("Q", problem.queries.dtype),
        ("X", problem.keys.dtype),
    )
    rows = (batch, heads, chunks, parts, 4 * tiles_of_rows)
    sums, weights = _split_kernel()(
        inputs=[
            problem.queries,
            problem.keys,
            problem.values,
            *_planes(key_codes),
            *_planes(value_codes),
            problem.bounds,
            rotation,
            rotation if codec.balance is None else codec.balance,
            bias,
            *_numbers(problem.scale, problem.sinks, problem.first_coded, coded),
        ],
        template=options,
        grid=(parts * SPLIT_THREADS, heads * chunks, batch),
        threadgroup=(SPLIT_THREADS, 1, 1),
        output_shapes=[(*rows, spec.value_dim), (*rows, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return _merge_kernel()(
        inputs=[sums, weights, codec.value_rotation.array, _counts(parts, exact_parts, count)],
        template=[
            ("VALUE_DIM", spec.value_dim),
            ("ROWS", 4 * tiles_of_rows),
            ("T", problem.queries.dtype),
        ],
        grid=(group * count * MERGE_THREADS, heads, batch),
        threadgroup=(MERGE_THREADS, 1, 1),
        output_shapes=[(batch, query_heads, count, spec.value_dim)],
        output_dtypes=[problem.queries.dtype],
    )[0]


def encode_keys(codec: KVCodec, keys: mx.array, start: int) -> Codes:
    """As :meth:`KVCodec.encode_keys`, the scales and the codes found in one launch."""
    spec = codec.spec
    return codec.encode_keys(keys, start, _quantizer(spec.key_codec, spec.key_bits))


def encode_values(codec: KVCodec, values: mx.array) -> Codes:
    """As :meth:`KVCodec.encode_values`, the scales and the codes found in one launch."""
    spec = codec.spec
    return codec.encode_values(values, _quantizer(spec.value_codec, spec.value_bits))


def _quantizer(codec: str, bits: int) -> Optional[Callable[[mx.array], Codes]]:
    return functools.partial(_encode, bits) if codec == "lloyd-max" else None


def _encode(bits: int, x: mx.array) -> Codes:
    """What codecs/lloyd_max.py makes of rotated vectors ``x``, fp32 (..., T, D)."""
    *shape, dim = x.shape
    count = math.prod(shape)
    blocks = -(-count // (SPLIT_THREADS // 32))
    codes, scale = _encode_kernel()(
        inputs=[x.reshape(count, dim)],
        template=[("DIM", dim), ("BITS", bits)],
        grid=(blocks * SPLIT_THREADS, 1, 1),
        threadgroup=(SPLIT_THREADS, 1, 1),
        output_shapes=[(*shape, dim), (*shape, 1)],
        output_dtypes=[mx.uint8, mx.uint8],
    )
    return (*packing.pack(codes, bits), scale)


@functools.lru_cache(maxsize=1024)
def _code_parts(problems: int, tiles: int) -> int:
    """Into how many parts to cut the ``tiles`` of each of ``problems`` for the least time.

    A block's four warps take a tile each at a time; a part costs about as much as two
    tiles before it starts and in the merge.
    """

    def time(parts):
        return -(-problems * parts // ROOM) * (-(-tiles // (4 * parts)) + 2)

    most = min(MOST_PARTS, -(-tiles // 4))
    return min(range(1, most + 1), key=time, default=0)


def _planes(codes) -> List[mx.array]:
    """Three planes of codes, some perhaps the same, and the scales."""
    *planes, scale = codes
    return [planes[0], planes[len(planes) // 2], planes[-1], scale]


@functools.lru_cache(maxsize=64)
def _numbers(scale: float, sinks: int, first_coded: int, coded: int) -> Tuple[mx.array, mx.array]:
    # By way of NumPy, since lazy arrays must not be shared by threads.
    return (
        mx.array(np.array([scale], np.float32)),
        mx.array(np.array([sinks, first_coded, coded], np.int32)),
    )


@functools.lru_cache(maxsize=64)
def _counts(parts: int, exact_parts: int, count: int) -> mx.array:
    return mx.array(np.array([parts, exact_parts, count], np.int32))


SPLIT_INPUTS = (
    "queries",
    "keys",
    "values",
    *(f"{side}_{part}" for side in ("kc", "vc") for part in ("low", "mid", "high", "size")),
    "bounds",
    "rotation",
    "balance",
    "bias",
    "factor",
    "numbers",
)

SPLIT_BODY = """
  Problem<Q, X> p = {
      queries, keys, values, {{kc_low, kc_mid, kc_high}, kc_size},
      {{vc_low, vc_mid, vc_high}, vc_size}, bounds, rotation, balance, bias, factor[0],
      keys_shape[1], queries_shape[1] / keys_shape[1], queries_shape[2],
      numbers[0], keys_shape[2], numbers[1], numbers[2], sums, weights};
  int exact_parts = (p.exact + EXACT_PART - 1) / EXACT_PART;
  if (blockIdx.x < exact_parts) {
    attend_exact<4 * NT, DIM, VALUE_DIM>(p, blockIdx.x);
  } else {
    attend_codes<DIM, VALUE_DIM, KEY_BITS, VALUE_BITS, NT, TILE, WHOLE_TILES, BALANCED, BIASED>(
        p, blockIdx.x - exact_parts, gridDim.x - exact_parts);
  }
"""

MERGE_BODY = """
  merge_parts<VALUE_DIM, ROWS>(
      sums, weights, rotation, out, counts[0], counts[1], counts[2]);
"""


ENCODE_BODY = """
  encode_vectors<DIM, BITS>(x, codes, scales, x_shape[0]);
"""


@functools.lru_cache(maxsize=None)
def _encode_kernel():
    return _kernel("encode", ("x",), ("codes", "scales"), ENCODE_BODY)


@functools.lru_cache(maxsize=None)
def _split_kernel():
    return _kernel("split", SPLIT_INPUTS, ("sums", "weights"), SPLIT_BODY)


@functools.lru_cache(maxsize=None)
def _merge_kernel():
    return _kernel("merge", ("sums", "weights", "rotation", "counts"), ("out",), MERGE_BODY)


def _kernel(name: str, inputs, outputs, body: str):
    # MLX may keep what it compiled under this name, and does not see the files.
    version = zlib.crc32("".join([_levels(), *map(read, PARTS), body]).encode())
    return mx.fast.cuda_kernel(
        name=f"turboquant_{name}_{version:08x}",
        input_names=inputs,
        output_names=outputs,
        source=body,
        header=source(name),
    )


PARTS = ("ptx.cu", "codes.cu", "rotation.cu", "split.cu", "merge.cu", "encode.cu")


def source(name: str) -> str:
    """The CUDA source that comes before the body of the kernel ``name``.

    MLX hashes all of it at every launch, for 15 us if the files were in it.
    """
    bounds = {
        "split": f"{SPLIT_THREADS}, {BLOCKS}",
        "merge": f"{MERGE_THREADS}",
        "encode": f"{SPLIT_THREADS}",
    }[name]
    attributes = f"__attribute__((global)) __launch_bounds__({bounds})"
    # MLX writes the signature. The bounds give a thread of the first launch 128 registers.
    last = f"#undef __global__\n#define __global__ {attributes}\n"
    return "\n".join([_levels(), *map(include, PARTS), last])


def include(part: str) -> str:
    """The line that brings in a file of this package."""
    return f'#include "{files(__package__) / part}"'


def read(part: str) -> str:
    """The text of a file of this package."""
    return (files(__package__) / part).read_text("utf-8")


def _levels() -> str:
    """The codebooks: tables for look_up() in codes.cu, and levels for encode.cu."""
    text = ["template <int BITS> struct LEVELS;"]
    for bits, book in CODEBOOKS.items():
        upper = [math.floor(level) for level in book.levels]
        lower = [~level for level in reversed(upper)]
        table = lower + [level + 1 for level in upper] if bits == 4 else lower + upper
        numbers = np.array(table, np.int8).tobytes().ljust(16, b"\0")
        words = ", ".join(f"{word}u" for word in np.frombuffer(numbers, np.uint32))
        text.append(
            f"template <> struct LEVELS<{bits}> {{\n"
            f"  static constexpr unsigned words[4] = {{{words}}};\n"
            f"  static constexpr float unit = {book.unit}f;\n"
            "  __device__ static constexpr float positive(int i) {\n"
            f"    constexpr float levels[] = {{{', '.join(f'{x}f' for x in book.levels)}}};\n"
            "    return levels[i];\n  }\n};"
        )
    return "\n".join(text)

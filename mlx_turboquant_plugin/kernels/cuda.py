"""The fused attention kernel for NVIDIA GPUs (compute capability 8.0 and later), and the encoder."""

import functools
import math
import zlib
from importlib.resources import files
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Tuple

import mlx.core as mx
import numpy as np

from ..codecs.kv_codec import Codes, CodecSpec, KVCodec
from ..codecs.lloyd_max import CODEBOOKS
from ..codecs.rotation import Rotation
from . import encodes, unsupported

if TYPE_CHECKING:
    from ..attention.fused import Problem

# Threads of a block in split.cu and merge.cu, and exact tokens of a part.
SPLIT_THREADS, MERGE_THREADS = 128, 512
EXACT_PART = 64

# Tokens of a block of encode.cu, which has a warp for each.
ENCODED = 32
ENCODE_THREADS = 32 * ENCODED

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
    codec, queries, exact = problem.codec, problem.queries, problem.exact_tokens
    unjoined = exact.unjoined
    if unjoined is None:
        tokens, appended, drop = (exact.keys, exact.values), 0, 0
    else:
        tokens, drop = unjoined[:4], unjoined.drop
        appended = exact.count - (tokens[0].shape[2] - drop)
    coded = problem.key_codes[-1].shape[-1]
    split, merge = _launches(
        codec.spec,
        codec.balance is not None,
        codec.bias is not None,
        problem.scale,
        problem.sinks,
        queries.shape,
        queries.dtype,
        tokens[0].shape[1],
        exact.count,
        exact.dtypes[0],
        appended,
        drop,
        coded,
    )
    inputs = [queries, *tokens, *problem.key_codes, *problem.value_codes, problem.bounds]
    inputs.append(codec.key_rotation.array)
    if codec.balance is not None:
        inputs.append(codec.balance)
    if codec.bias is not None:
        batch, heads, count, dim = queries.shape
        q = queries.astype(mx.float32).reshape(batch, tokens[0].shape[1], -1, dim)
        inputs.append(codec.bias.scores(q, problem.first_coded, coded))
    sums, weights, *joined = split(inputs)
    if joined:
        exact.join(*joined)
    return merge([sums, weights, codec.value_rotation.array])[0]


@functools.lru_cache(maxsize=1024)
def _launches(
    spec: CodecSpec,
    balanced: bool,
    biased: bool,
    scale: float,
    sinks: int,
    queries: Tuple[int, ...],
    dtype: mx.Dtype,
    heads: int,
    exact: int,
    exact_dtype: mx.Dtype,
    appended: int,
    drop: int,
    coded: int,
) -> Tuple[Callable, Callable]:
    """The two launches as functions of their inputs. All layers ask for the same.

    Args:
        queries: (B, H_q, N, D), the shape of the queries.
        heads: H.
        exact: E, the exact tokens with those that are ``appended``.
        drop: how many of the older tokens after the sinks count no more.
    """
    batch, query_heads, count, dim = queries
    rows = query_heads // heads * count
    tiles_of_rows = 1 if rows <= 4 or max(dim, spec.value_dim) > 128 else 2
    tile = 64 if tiles_of_rows == 1 and max(dim, spec.value_dim) <= 128 else 32
    chunks = -(-rows // (4 * tiles_of_rows))
    exact_parts = -(-exact // EXACT_PART)
    parts = exact_parts + _code_parts(batch * heads * chunks, -(-coded // tile))
    joining = exact_parts if appended else 0
    shape = (batch, heads, chunks, parts, 4 * tiles_of_rows)
    joined = [(batch, heads, exact, d) for d in (dim, spec.value_dim)] if appended else []
    split = functools.partial(
        _call,
        _split_kernel(
            spec, tiles_of_rows, tile, coded % 32 == 0, balanced, biased, scale, sinks, appended > 0, drop
        ),
        grid=((parts + joining) * SPLIT_THREADS, heads * chunks, batch),
        threadgroup=(SPLIT_THREADS, 1, 1),
        output_shapes=[(*shape, spec.value_dim), (*shape, 3), *joined],
        output_dtypes=[mx.float32, mx.float32, *[exact_dtype] * len(joined)],
    )
    merge = functools.partial(
        _call,
        _merge_kernel(spec.value_dim, 4 * tiles_of_rows, count),
        grid=(rows * MERGE_THREADS, heads, batch),
        threadgroup=(MERGE_THREADS, 1, 1),
        output_shapes=[(batch, query_heads, count, spec.value_dim)],
        output_dtypes=[dtype],
    )
    return split, merge


def _call(kernel: Callable, inputs: List[mx.array], **launch) -> List[mx.array]:
    return kernel(inputs=inputs, **launch)


def encode_keys(codec: KVCodec, keys: mx.array, start: int) -> Codes:
    """As :meth:`KVCodec.encode_keys`; Lloyd-Max codes in one launch, but for the key bias."""
    spec = codec.spec
    if not encodes(spec.key_codec, keys):
        return codec.encode_keys(keys, start)
    bias = None if codec.bias is None else codec.bias.rotated(start, keys.shape[2])
    return _encode(keys, spec.key_bits, codec.key_rotation, True, codec.balance, bias)


def encode_values(codec: KVCodec, values: mx.array) -> Codes:
    """As :meth:`KVCodec.encode_values`; Lloyd-Max codes in one launch."""
    spec = codec.spec
    if not encodes(spec.value_codec, values):
        return codec.encode_values(values)
    return _encode(values, spec.value_bits, codec.value_rotation, False)


def _encode(
    x: mx.array,
    bits: int,
    rotation: Rotation,
    channel_major: bool,
    balance: Optional[mx.array] = None,
    bias: Optional[mx.array] = None,
) -> Codes:
    """Codes of ``x`` (B, H, T, D), which may be part of a larger array.

    Args:
        balance: fp32 (H, 1, D).
        bias: what is taken away from each sequence, fp32 (H, T, D).
    """
    batch, heads, length, dim = x.shape
    widths = [dim // 8] * 3 if bits == 3 else [dim * bits // 8]
    # The kernel takes x as it lies, so MLX copies nothing, and these must be contiguous.
    model = (rotation.array if y is None else mx.contiguous(y) for y in (balance, bias))
    codes = _encode_kernel(len(widths))(
        inputs=[x, rotation.array, *model],
        template=[
            ("DIM", dim),
            ("BITS", bits),
            ("CHANNEL_MAJOR", channel_major),
            ("BALANCED", balance is not None),
            ("BIASED", bias is not None),
        ],
        grid=(-(-length // ENCODED) * ENCODE_THREADS, heads, batch),
        threadgroup=(ENCODE_THREADS, 1, 1),
        output_shapes=[
            (batch, heads, width, length) if channel_major else (batch, heads, length, width)
            for width in (*widths, 1)
        ],
        output_dtypes=[mx.uint8] * (len(widths) + 1),
    )
    return tuple(codes)


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


SPLIT_BODY = """
  auto p = problem(queries, keys, values, {kc_planes}, kc_size, {vc_planes}, vc_size);
  p.bounds = bounds, p.rotation = rotation, p.balance = {balance}, p.bias = {bias};
  p.scale = SCALE, p.sinks = SINKS;
  p.heads = keys_shape[1], p.group = queries_shape[1] / p.heads, p.count = queries_shape[2];
  p.older = keys_shape[2], p.coded = kc_size_shape[3], p.drop = DROP;
  p.exact = p.older - DROP, p.parts = gridDim.x;
  p.sums = sums, p.weights = weights;
  {appended}
  int exact_parts = (p.exact + EXACT_PART - 1) / EXACT_PART;
  if (blockIdx.x < exact_parts) {{
    attend_exact<4 * NT, DIM, VALUE_DIM>(p, blockIdx.x);
  }} else {{
    attend_codes<DIM, VALUE_DIM, KEY_BITS, VALUE_BITS, NT, TILE, WHOLE_TILES, BALANCED, BIASED>(
        p, blockIdx.x - exact_parts, p.parts - exact_parts);
  }}
"""

# The last blocks of each KV head join tokens.
APPENDED_BODY = """
  p.exact += new_keys_shape[2];
  int joined = (p.exact + EXACT_PART - 1) / EXACT_PART;
  p.parts -= joined;
  p.new_keys = new_keys, p.new_values = new_values;
  if (blockIdx.x >= p.parts) {
    int chunks = gridDim.y / p.heads;
    long long head = blockIdx.z * p.heads + blockIdx.y / chunks;
    if (blockIdx.y % chunks == 0) {
      join_tokens<DIM>(p, keys, new_keys, all_keys, head, blockIdx.x - p.parts);
      join_tokens<VALUE_DIM>(p, values, new_values, all_values, head, blockIdx.x - p.parts);
    }
    return;
  }
"""

MERGE_BODY = """
  merge_parts<VALUE_DIM, ROWS>(sums, weights, rotation, out, sums_shape[3], COUNT);
"""

ENCODE_BODY = """
  encode_vectors<DIM, BITS, CHANNEL_MAJOR, BALANCED, BIASED>(
      x + blockIdx.z * x_strides[0] + blockIdx.y * x_strides[1], x_strides[2], x_strides[3],
      x_shape[2], rotation, balance, bias, planes, scales);
"""


@functools.lru_cache(maxsize=None)
def _encode_kernel(planes: int):
    inputs, outputs = ("x", "rotation", "balance", "bias"), ("low", "mid", "high")[:planes]
    body = f"\n  unsigned char* planes[] = {{{', '.join(outputs)}}};{ENCODE_BODY}"
    return _kernel("encode", inputs, (*outputs, "scales"), body, ensure_row_contiguous=False)


# Numbers are written into the source: MLX would convert and compare them on every call.
@functools.lru_cache(maxsize=None)
def _split_kernel(
    spec: CodecSpec,
    tiles_of_rows: int,
    tile: int,
    whole_tiles: bool,
    balanced: bool,
    biased: bool,
    scale: float,
    sinks: int,
    appends: bool,
    drop: int,
):
    planes = {
        side: [f"{side}_{i}" for i in range(3 if bits == 3 else 1)]
        for side, bits in (("kc", spec.key_bits), ("vc", spec.value_bits))
    }
    inputs = ["queries", "keys", "values", *(["new_keys", "new_values"] if appends else [])]
    for side, names in planes.items():
        inputs += [*names, f"{side}_size"]
    inputs += ["bounds", "rotation", *["balance"] * balanced, *["bias"] * biased]
    body = SPLIT_BODY.format(
        **{f"{side}_planes": "{" + ", ".join(names) + "}" for side, names in planes.items()},
        balance="balance" if balanced else "nullptr",
        bias="bias" if biased else "nullptr",
        appended=APPENDED_BODY if appends else "",
    )
    numbers = {
        "DIM": spec.head_dim,
        "VALUE_DIM": spec.value_dim,
        "KEY_BITS": spec.key_bits,
        "VALUE_BITS": spec.value_bits,
        "NT": tiles_of_rows,
        "TILE": tile,
        "WHOLE_TILES": whole_tiles,
        "BALANCED": balanced,
        "BIASED": biased,
        "SINKS": sinks,
        "DROP": drop,
    }
    body = f"  constexpr float SCALE = {float(scale)}f;\n{_constants(numbers)}{body}"
    outputs = ["sums", "weights", *(["all_keys", "all_values"] if appends else [])]
    return _kernel("split", inputs, outputs, body)


@functools.lru_cache(maxsize=None)
def _merge_kernel(value_dim: int, rows: int, count: int):
    numbers = {"VALUE_DIM": value_dim, "ROWS": rows, "COUNT": count}
    return _kernel(
        "merge", ("sums", "weights", "rotation"), ("out",), _constants(numbers) + MERGE_BODY
    )


def _constants(numbers: Dict[str, int]) -> str:
    return "".join(f"  constexpr int {name} = {int(x)};\n" for name, x in numbers.items())


def _kernel(name: str, inputs, outputs, body: str, ensure_row_contiguous: bool = True):
    # MLX may keep what it compiled under this name, and does not see the files.
    version = zlib.crc32("".join([_levels(), *map(read, PARTS), body]).encode())
    return mx.fast.cuda_kernel(
        name=f"turboquant_{name}_{version:08x}",
        input_names=inputs,
        output_names=outputs,
        source=body,
        header=source(name),
        ensure_row_contiguous=ensure_row_contiguous,
    )


PARTS = ("ptx.cu", "codes.cu", "rotation.cu", "split.cu", "merge.cu", "encode.cu")


def source(name: str) -> str:
    """The CUDA source that comes before the body of the kernel ``name``.

    MLX hashes all of it at every launch, for 15 us if the files were in it.
    """
    bounds = {
        "split": f"{SPLIT_THREADS}, {BLOCKS}",
        "merge": f"{MERGE_THREADS}",
        "encode": f"{ENCODE_THREADS}",
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

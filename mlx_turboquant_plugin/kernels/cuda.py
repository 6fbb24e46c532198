"""The fused attention kernel for NVIDIA GPUs (compute capability 8.0 and later), and the encoder."""

import functools
from typing import TYPE_CHECKING, Callable, Dict, Tuple

import mlx.core as mx

from ..codecs.kv_codec import CodecSpec
from ..per_thread import cached_per_thread
from . import cuda_portable, cuda_source
from .cuda_encode import encode
from .cuda_source import BLOCKS, MERGE_THREADS, SPLIT_THREADS

if TYPE_CHECKING:
    from ..attention.fused import Problem

# Exact tokens of a part.
EXACT_PART = 64

# Blocks of the first launch that run at once on the 132 multiprocessors of an H100 or H200;
# MLX does not tell how many there are.
ROOM = 132 * BLOCKS

MOST_PARTS = 256

__all__ = ["attend", "encode"]


def attend(problem: "Problem") -> mx.array:
    """Attention in two launches: (B, H_q, N, D_v) in the dtype of the queries."""
    codec, queries, exact = problem.codec, problem.queries, problem.exact_tokens
    if "affine" in (codec.spec.key_codec, codec.spec.value_codec):
        return cuda_portable.attend(problem)
    unjoined = exact.unjoined
    if unjoined is None or unjoined.drop > 1:
        # More than one go only after a trim or when several tokens come, and each number has
        # a kernel of its own.
        tokens, appended, drop = (exact.keys, exact.values), 0, 0
    else:
        tokens, drop = unjoined[:4], unjoined.drop
        appended = exact.count - (tokens[0].shape[2] - drop)
    coded = problem.key_codes[-1].shape[-1]
    attention = _attention(
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
        inputs.append(codec.bias.scores(codec.bias.coefficients(q), problem.first_coded, coded))
    out, *joined = attention(codec.value_rotation.array, *inputs)
    if joined:
        exact.join(*joined)
    return out


# All layers ask for the same, until there are more codes. MLX keeps traces by thread.
@cached_per_thread(maxsize=64)
def _attention(
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
) -> Callable[..., Tuple[mx.array, ...]]:
    """The two launches as one function of the rotation of the values and of all other inputs.

    It is traced once: MLX writes a kernel's source anew whenever a launch is described, which
    takes longer than the launch.

    Args:
        queries: (B, H_q, N, D), the shape of the queries.
        heads: H.
        exact: E, the exact tokens with those that are ``appended``.
        drop: how many of the older tokens after the sinks count no more.

    Returns:
        A function that returns the attention, and joined keys and values if any are
        ``appended``.
    """
    batch, query_heads, count, dim = queries
    rows = query_heads // heads * count
    tiles_of_rows = 1 if rows <= 4 or max(dim, spec.value_dim) > 128 else 2
    tile = 64 if tiles_of_rows == 1 and max(dim, spec.value_dim) <= 128 else 32
    rows_of_block = 4 * tiles_of_rows
    chunks = -(-rows // rows_of_block)
    exact_parts = -(-exact // EXACT_PART)
    parts = exact_parts + _code_parts(batch * heads * chunks, -(-coded // tile))
    joining = exact_parts if appended else 0
    partial = (batch, heads, chunks, parts, rows_of_block * (spec.value_dim + 3))
    joined = [(batch, heads, exact, d) for d in (dim, spec.value_dim)] if appended else []
    split = functools.partial(
        _split_kernel(
            spec,
            tiles_of_rows,
            tile,
            coded % 32 == 0,
            balanced,
            biased,
            scale,
            sinks,
            appended > 0,
            drop,
        ),
        grid=((parts + joining) * SPLIT_THREADS, heads * chunks, batch),
        threadgroup=(SPLIT_THREADS, 1, 1),
        output_shapes=[partial, *joined],
        output_dtypes=[mx.float32, *[exact_dtype] * len(joined)],
    )
    merge = functools.partial(
        _merge_kernel(spec.value_dim, rows_of_block, count),
        grid=(rows * MERGE_THREADS, heads, batch),
        threadgroup=(MERGE_THREADS, 1, 1),
        output_shapes=[(batch, query_heads, count, spec.value_dim)],
        output_dtypes=[dtype],
    )

    def attention(value_rotation: mx.array, *inputs: mx.array) -> Tuple[mx.array, ...]:
        partial, *joined = split(inputs=inputs)
        return (*merge(inputs=[partial, value_rotation]), *joined)

    return mx.compile(attention)


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
  p.partial = partial;
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
  merge_parts<VALUE_DIM, ROWS>(partial, rotation, out, partial_shape[3], COUNT);
"""


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
    outputs = ["partial", *(["all_keys", "all_values"] if appends else [])]
    return cuda_source.kernel("split", inputs, outputs, body)


@functools.lru_cache(maxsize=None)
def _merge_kernel(value_dim: int, rows: int, count: int):
    numbers = {"VALUE_DIM": value_dim, "ROWS": rows, "COUNT": count}
    return cuda_source.kernel(
        "merge", ("partial", "rotation"), ("out",), _constants(numbers) + MERGE_BODY
    )


def _constants(numbers: Dict[str, int]) -> str:
    return "".join(f"  constexpr int {name} = {int(x)};\n" for name, x in numbers.items())

"""Launches the fused attention kernels of NVIDIA GPUs."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ...codecs.kv_codec import CodecSpec
from ...per_thread import cached_per_thread
from ..inputs import int_array
from ..problem import Problem
from ..sizes import Merge, Split
from . import portable, source
from .bias import rotary_array
from .layer import Kind, Layer, layer_of
from .source import BLOCKS

# Blocks of the first launch that run at once on the 132 multiprocessors of an H100 or H200;
# MLX does not tell how many there are.
ROOM = 132 * BLOCKS

# With those of full-precision tokens, of which there are fewer, the merge must have room for them.
MOST_SPLITS = Merge.MERGED_SPLITS // 4


class Launch(NamedTuple):
    """What a step of decoding launches for every layer of a kind.

    Attributes:
        attention: see :func:`_attention`.
        numbers: its last inputs, which are about positions and the same for any batch.
    """

    attention: Callable[..., tuple[mx.array, ...]]
    numbers: tuple[mx.array, ...]


def attend(problem: Problem) -> mx.array:
    """Attention in two launches: (B, H_q, N, D_v) in the dtype of the queries."""
    codec, full = problem.codec, problem.full_tokens
    if "affine" in (codec.spec.key_codec, codec.spec.value_codec):
        return portable.attend(problem)
    unjoined = full.unjoined
    if unjoined is None or unjoined.drop > 1:
        # More than one go only after a trim or when several tokens come, and each number has
        # a trace of its own.
        tokens, drop = [full.keys, full.values], 0
    else:
        tokens, drop = list(unjoined[:4]), unjoined.drop
    layer = layer_of(codec)
    learned = () if problem.learned_sinks is None else (problem.learned_sinks,)
    key = layer.kind, layer.table, problem.scale, len(tokens), drop, len(learned)
    launch = problem.shared.get(key)
    if launch is None:
        launch = problem.shared[key] = _launch(problem, layer, drop)
    out, *joined = launch.attention(
        problem.queries,
        *tokens,
        *problem.key_codes,
        *problem.value_codes,
        *layer.known,
        problem.bounds,
        *launch.numbers,
        *learned,
    )
    if joined:
        full.join(*joined)
    return out


def _launch(problem: Problem, layer: Layer, drop: int) -> Launch:
    quantized = problem.key_codes[-1].shape[-1]
    numbers = [int_array(problem.first_quantized, drop)]
    if layer.table is not None:
        numbers.append(rotary_array(layer.table, problem.first_quantized + quantized))
    full = problem.full_tokens.count
    learned = problem.learned_sinks is not None
    attention = _attention(layer.kind, problem.scale, problem.sinks, full, drop, quantized, learned)
    return Launch(attention, tuple(numbers))


# All layers ask for the same, until there are more codes. MLX keeps traces by thread.
@cached_per_thread(maxsize=64)
def _attention(
    kind: Kind, scale: float, sinks: int, full: int, drop: int, quantized: int, learned: bool
) -> Callable[..., tuple[mx.array, ...]]:
    """The two launches as one function of the queries and all other inputs but the rotations.

    It is traced once, and again for arrays of other shapes or dtypes: MLX writes a kernel's
    source anew whenever a launch is described, which takes longer than the launch.

    Args:
        full: E, the full-precision tokens with those that are not joined to the older ones.
        drop: how many of the older tokens after the sinks count no more.
        quantized: how many tokens there are as codes; so that a function has few traces, among
            which MLX looks for one after the other.
        learned: whether the last input is of learned sinks.

    Returns:
        A function that returns the attention, and joined keys and values if they are not yet.
    """
    spec, rotations = kind.spec, kind.rotations

    def attention(queries, keys, *others):
        others, learned_sinks = (others[:-1], others[-1:]) if learned else (others, ())
        batch, query_heads, count, dim = queries.shape
        heads, older = keys.shape[1:3]
        appends = full > older - drop
        rows = query_heads // heads * count
        tiles_of_rows, tile = _tile(spec, rows)
        rows_of_block = 4 * tiles_of_rows
        row_blocks = -(-rows // rows_of_block)
        full_splits = -(-full // Split.FULL_SPLIT)
        splits = full_splits + _code_splits(batch * heads * row_blocks, -(-quantized // tile))
        joining = full_splits if appends else 0
        partial = (batch, heads, row_blocks, splits, rows_of_block * (spec.value_dim + 3))
        joined = [(batch, heads, full, d) for d in (dim, spec.value_dim)] if appends else []
        whole_tiles = quantized % Split.SHORT_TILE == 0
        split = _split_kernel(kind, tiles_of_rows, tile, whole_tiles, scale, sinks, appends)
        partial, *joined = split(
            inputs=[rotations, queries, keys, *others],
            grid=((splits + joining) * Split.THREADS, heads * row_blocks, batch),
            threadgroup=(Split.THREADS, 1, 1),
            output_shapes=[partial, *joined],
            output_dtypes=[mx.float32, *[keys.dtype] * len(joined)],
        )
        merge = _merge_kernel(spec.value_dim, rows_of_block, count, learned)
        merged = merge(
            inputs=[partial, rotations, *learned_sinks],
            grid=(rows * Merge.MERGE_THREADS, heads, batch),
            threadgroup=(Merge.MERGE_THREADS, 1, 1),
            output_shapes=[(batch, query_heads, count, spec.value_dim)],
            output_dtypes=[queries.dtype],
        )
        return *merged, *joined

    return mx.compile(attention)


def _tile(spec: CodecSpec, rows: int) -> tuple[int, int]:
    """How many times four rows a block serves, and how many tokens a warp takes at a time.

    Args:
        rows: query rows of a KV head.
    """
    dim = max(spec.head_dim, spec.value_dim)
    if rows > 4 and dim <= 128:
        return 2, Split.SHORT_TILE
    return 1, Split.LONG_TILE if dim <= 128 else Split.SHORT_TILE


@functools.lru_cache(maxsize=1024)
def _code_splits(problems: int, tiles: int) -> int:
    """Into how many splits to cut the ``tiles`` of each of ``problems`` for the least time.

    A block's warps take a tile each at a time; a split costs about as much as two
    tiles before it starts and in the merge.
    """

    def time(splits):
        return -(-problems * splits // ROOM) * (-(-tiles // (Split.WARPS * splits)) + 2)

    most = min(MOST_SPLITS, -(-tiles // Split.WARPS))
    return min(range(1, most + 1), key=time, default=0)


SPLIT_BODY = """
  auto p = problem(queries, keys, values, {kc_planes}, kc_size, {vc_planes}, vc_size);
  p.bounds = bounds, p.rotation = rotations + rotation_size(VALUE_DIM);
  {known}
  {bias}
  p.scale = SCALE, p.sinks = SINKS;
  p.heads = keys_shape[1], p.group = queries_shape[1] / p.heads, p.count = queries_shape[2];
  p.older = keys_shape[2], p.quantized = kc_size_shape[3];
  p.first_quantized = places[0], p.drop = places[1];
  p.full = p.older - p.drop, p.splits = gridDim.x;
  p.partial = partial;
  {appended}
  int full_splits = (p.full + FULL_SPLIT - 1) / FULL_SPLIT;
  if (blockIdx.x < full_splits) {{
    attend_full<4 * NT, DIM, VALUE_DIM>(p, blockIdx.x);
  }} else {{
    attend_codes<
        DIM, VALUE_DIM, KEY_BITS, SEGMENTS, VALUE_BITS, NT, TILE, WHOLE_TILES, BALANCED, SORTED,
        PAIRS>(p, blockIdx.x - full_splits, p.splits - full_splits);
  }}
"""

# Of each head, as far as there are any.
KNOWN_BODY = """
  p.balance = known;
  p.bias = p.balance + BALANCED * (keys_shape[1] * DIM);
  p.layout = reinterpret_cast<const int*>(p.bias + (PAIRS > 0) * (keys_shape[1] * DIM));
"""

BIAS_BODY = """
  RotaryArray<PAIRS> array{rotary, rotary_shape[0]};
  p.waves = array.waves(TILE), p.rotary = array.pairs(BETWEEN, DISTANCE);
"""

# The last blocks of each KV head join tokens.
APPENDED_BODY = """
  p.full += new_keys_shape[2];
  int joined = (p.full + FULL_SPLIT - 1) / FULL_SPLIT;
  p.splits -= joined;
  p.new_keys = new_keys, p.new_values = new_values;
  if (blockIdx.x >= p.splits) {
    int row_blocks = gridDim.y / p.heads;
    long long head = blockIdx.z * p.heads + blockIdx.y / row_blocks;
    if (blockIdx.y % row_blocks == 0) {
      join_tokens<DIM>(p, keys, new_keys, all_keys, head, blockIdx.x - p.splits);
      join_tokens<VALUE_DIM>(p, values, new_values, all_values, head, blockIdx.x - p.splits);
    }
    return;
  }
"""

MERGE_BODY = """
  merge_splits<VALUE_DIM, ROWS, {learned}>(
      partial, rotations, {learned_sinks}, out, partial_shape[3], COUNT);
"""


# Numbers are written into the source: MLX would convert and compare them on every call. Not what
# changes while a sequence grows: a kernel takes seconds to compile.
@functools.cache
def _split_kernel(
    kind: Kind,
    tiles_of_rows: int,
    tile: int,
    whole_tiles: bool,
    scale: float,
    sinks: int,
    appends: bool,
):
    spec, (pairs, between, distance) = kind.spec, kind.pairs
    planes = {
        side: [f"{side}_{i}" for i in range(3 if bits == 3 else 1)]
        for side, bits in (("kc", spec.key_bits), ("vc", spec.value_bits))
    }
    inputs = ["rotations", "queries", "keys", "values"]
    inputs += ["new_keys", "new_values"] if appends else []
    for side, names in planes.items():
        inputs += [*names, f"{side}_size"]
    knows = kind.balanced or kind.ordered or pairs > 0
    inputs += [*["known"] * knows, "bounds", "places", *["rotary"] * (pairs > 0)]
    body = SPLIT_BODY.format(
        **{f"{side}_planes": "{" + ", ".join(names) + "}" for side, names in planes.items()},
        known=KNOWN_BODY if knows else "",
        bias=BIAS_BODY if pairs else "",
        appended=APPENDED_BODY if appends else "",
    )
    numbers = {
        "DIM": spec.head_dim,
        "VALUE_DIM": spec.value_dim,
        "KEY_BITS": spec.key_bits,
        "SEGMENTS": spec.segments,
        "VALUE_BITS": spec.value_bits,
        "NT": tiles_of_rows,
        "TILE": tile,
        "WHOLE_TILES": whole_tiles,
        "BALANCED": kind.balanced,
        "SORTED": kind.ordered,
        "PAIRS": pairs,
        "BETWEEN": between,
        "DISTANCE": distance,
        "SINKS": sinks,
    }
    body = f"  constexpr float SCALE = {float(scale)}f;\n{_constants(numbers)}{body}"
    outputs = ["partial", *(["all_keys", "all_values"] if appends else [])]
    return source.kernel("split", inputs, outputs, body)


@functools.cache
def _merge_kernel(value_dim: int, rows: int, count: int, learned: bool):
    numbers = {"VALUE_DIM": value_dim, "ROWS": rows, "COUNT": count}
    inputs = ["partial", "rotations", *["learned_sinks"] * learned]
    # What is not there is not read.
    body = MERGE_BODY.format(learned=str(learned).lower(), learned_sinks=inputs[-1])
    return source.kernel("merge", inputs, ("out",), _constants(numbers) + body)


def _constants(numbers: dict[str, int]) -> str:
    return "".join(f"  constexpr int {name} = {int(x)};\n" for name, x in numbers.items())

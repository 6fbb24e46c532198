"""Launches the Metal kernels: attention of a few queries in two launches, encoding in one.

``decode.metal`` makes partial sums over splits of the tokens, ``merge.metal`` the
attention from them; ``encode.metal`` makes codes. What comes before each, :func:`parts`
says. A kernel is compiled once for head dims, bits, dtypes and numbers of queries; lengths
are looked up while it runs.

MLX's operations make the codes of a layer in about 240 launches (by the graph of MLX 0.32.4, for
keys in one segment), again for each 32 tokens that are generated. That is why there is a kernel
for it, which has not been timed.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from ...codecs.kv_codec import ALL, Codes, KVCodec, joined
from ..inputs import MODEL, code_arrays, int_array, inverse_array, level_array, model_arrays
from ..problem import Problem
from ..sizes import METAL, Decode, Dequantize, GroupEncode, Scores, Simdgroups, constants
from ..sizes import Codes as CodeSizes
from ..support import encodes

# Threadgroups that keep the largest GPU busy; more than that only make the merge longer.
GROUPS = 1024
MAX_SPLITS = 64

# A kernel's file, its inputs and its outputs.
DECODE = (
    "decode",
    "queries keys values k0 k1 k2 key_scale key_zero v0 v1 v2 value_scale value_zero "
    f"key_rotation {MODEL} bounds sizes scale",
    "partial",
)
MERGE = "merge", "partial value_rotation sizes", "out"
MERGE_LEARNED = "merge", f"{MERGE[1]} learned_sinks", "out"
ENCODE = "encode", f"x rotation {MODEL} feedback places", "low scales"
ENCODE_3_BITS = *ENCODE[:2], "low low_of_upper_fields high scales"
# What a kernel begins with, after codes.metal, and what it has of the sizes.
PARTS = {
    "decode": ["attention", "full_precision", "quantized"],
    "merge": ["splits"],
    "encode": ["quantizer"],
    "dequantize": ["tokens"],
}
TABLES: dict[str, type] = {
    "decode": Decode,
    "merge": Simdgroups,
    "encode": GroupEncode,
    "dequantize": Dequantize,
}


def attend(problem: Problem, compiled: Callable[..., Any] | None = None) -> mx.array:
    """Attention (B, H_q, N, D_v), in the dtype of the queries.

    Args:
        compiled: makes a kernel of the name of its file, its inputs and its outputs; by
            default one of Metal.
    """
    compiled = compiled or kernel
    codec, spec = problem.codec, problem.codec.spec
    batch, heads, count, dim = problem.queries.shape
    full_keys, full_values = problem.full_tokens.keys, problem.full_tokens.values
    kv_heads, full = full_keys.shape[1:3]
    rows = heads // kv_heads * count
    rows_of_block = _rows_of_block(rows, max(dim, spec.value_dim))
    row_blocks = -(-rows // rows_of_block)
    keys = code_arrays(problem.key_codes, spec.key_codec, batch * kv_heads, -1)
    values = code_arrays(problem.value_codes, spec.value_codec, batch * kv_heads, -2)
    quantized = problem.key_codes[-1].shape[-1] if problem.key_codes else 0
    full_splits, code_splits = _splits(full, quantized, batch * kv_heads * row_blocks)
    splits = full_splits + code_splits
    levels = level_array((spec.key_codec, spec.key_bits), (spec.value_codec, spec.value_bits))
    rotary, model = model_arrays(levels, codec, problem.first_quantized + quantized)
    sizes = int_array(
        problem.first_quantized, problem.sinks, full_splits, quantized, count, *rotary
    )
    (partial,) = compiled(*DECODE)(
        inputs=[
            problem.queries,
            full_keys,
            full_values,
            *keys,
            *values,
            codec.key_rotation.array,
            *model,
            problem.bounds,
            sizes,
            _scale(problem.scale),
        ],
        template=[
            ("DK", dim),
            ("DV", spec.value_dim),
            ("ROWS", rows_of_block),
            ("KEY_BITS", spec.key_bits),
            ("KEY_SEGMENTS", spec.segments),
            ("KEY_AFFINE", spec.key_codec == "affine"),
            ("VALUE_BITS", spec.value_bits),
            ("VALUE_AFFINE", spec.value_codec == "affine"),
            ("BALANCED", codec.balance is not None),
            ("SORTED", codec.layout is not None),
            ("BIASED", codec.bias is not None),
        ],
        grid=(splits * Decode.THREADS, row_blocks, batch * kv_heads),
        threadgroup=(Decode.THREADS, 1, 1),
        output_shapes=[(batch * kv_heads, row_blocks, splits, rows_of_block, spec.value_dim + 2)],
        output_dtypes=[mx.float32],
    )
    learned = [] if problem.learned_sinks is None else [problem.learned_sinks]
    (out,) = compiled(*(MERGE_LEARNED if learned else MERGE))(
        inputs=[partial, inverse_array(codec.value_rotation), sizes, *learned],
        template=[("T", problem.queries.dtype), ("DV", spec.value_dim), ("ROWS", rows_of_block)],
        grid=(rows * Simdgroups.THREADS, batch * kv_heads, 1),
        threadgroup=(Simdgroups.THREADS, 1, 1),
        output_shapes=[(batch, heads, count, spec.value_dim)],
        output_dtypes=[problem.queries.dtype],
    )
    return out


def encode(
    codec: KVCodec,
    keys: mx.array,
    values: mx.array,
    start: int,
    older: tuple[Codes, Codes] = ((), ()),
    part: slice = ALL,
) -> tuple[Codes, Codes]:
    """As :meth:`KVCodec.encode`; codes of each in one launch, but for affine ones."""
    return (
        encode_keys(codec, keys, start, older[0], part),
        encode_values(codec, values, older[1], part),
    )


def encode_keys(
    codec: KVCodec, keys: mx.array, start: int, older: Codes = (), part: slice = ALL
) -> Codes:
    """As :meth:`KVCodec.encode_keys`; see :func:`encode`."""
    if not encodes(codec.spec.key_codec, keys):
        return codec.encode_keys(keys, start, older, part)
    return joined(older, _encode(codec, keys[:, :, part], True, start), axis=-1)


def encode_values(codec: KVCodec, values: mx.array, older: Codes = (), part: slice = ALL) -> Codes:
    """As :meth:`KVCodec.encode_values`; see :func:`encode`."""
    if not encodes(codec.spec.value_codec, values):
        return codec.encode_values(values, older, part)
    return joined(older, _encode(codec, values[:, :, part], False), axis=-2)


def _encode(codec: KVCodec, x: mx.array, is_keys: bool, start: int = 0) -> Codes:
    """Channel-major codes of keys from the position ``start`` on, or token-major ones of values."""
    batch, heads, length, dim = x.shape
    spec, segments, known = codec.spec, 1, None
    name, bits, rotation = spec.value_codec, spec.value_bits, codec.value_rotation
    if is_keys:
        name, bits, rotation = spec.key_codec, spec.key_bits, codec.key_rotation
        segments, known = spec.segments, codec
    rotary, model = model_arrays(level_array((name, bits)), known, start + length)
    feedback = known and known.feedback
    widths = [dim // 8] * 3 if bits == 3 else [dim * bits // 8]
    codes = kernel(*(ENCODE_3_BITS if bits == 3 else ENCODE))(
        inputs=[
            x,
            rotation.array,
            *model,
            model[0] if feedback is None else feedback,
            int_array(start, *rotary),
        ],
        template=[
            ("D", dim),
            ("BITS", bits),
            ("SEGMENTS", segments),
            ("CHANNEL_MAJOR", is_keys),
            ("FED_BACK", feedback is not None),
            ("BALANCED", is_keys and codec.balance is not None),
            ("SORTED", is_keys and codec.layout is not None),
            ("BIASED", is_keys and codec.bias is not None),
        ],
        grid=(-(-length // GroupEncode.ENCODED) * GroupEncode.THREADS, batch * heads, 1),
        threadgroup=(GroupEncode.THREADS, 1, 1),
        output_shapes=[
            (batch, heads, width, length) if is_keys else (batch, heads, length, width)
            for width in (*widths, segments)
        ],
        output_dtypes=[mx.uint8] * (len(widths) + 1),
    )
    return tuple(codes)


def _rows_of_block(rows: int, dim: int) -> int:
    """How many query rows a threadgroup serves: what its registers and memory can hold."""
    most = 8 if dim <= 128 else 4
    return next(n for n in (1, 2, 4, 8) if n >= min(rows, most))


def _splits(full: int, quantized: int, others: int) -> tuple[int, int]:
    """How many splits the full-precision tokens are cut into, and how many the quantized ones.

    Args:
        others: the threadgroups that each split has.
    """
    most = max(1, min(MAX_SPLITS, GROUPS // others))
    # So that each simdgroup has a tile.
    full_splits, code_splits = (
        -(-count // (tile * Decode.SIMDS))
        for count, tile in ((full, Decode.FULL_TILE), (quantized, Decode.TILE))
    )
    return min(most, full_splits), min(most, code_splits)


@functools.cache
def kernel(name: str, inputs: str, outputs: str) -> Any:
    """A kernel of the name of its file, its inputs and its outputs, as MLX compiles it."""
    output_names = outputs.split()
    return mx.fast.metal_kernel(
        name=f"turboquant_{name}",
        input_names=inputs.split(),
        output_names=output_names,
        source=body(name, inputs, outputs),
        header="\n".join([numbers(name), *map(source, parts(name))]),
    )


def body(name: str, inputs: str, outputs: str) -> str:
    """The function of a kernel, which may depend on how many inputs and outputs there are."""
    counts = ("INPUTS", inputs), ("OUTPUTS", outputs)
    lines = [f"#define {what} {len(names.split())}" for what, names in counts]
    return "\n".join([*lines, source(name)])


def parts(name: str) -> Sequence[str]:
    """The names of the files that come before a kernel, in their order."""
    return ["codes", *PARTS.get(name, ())]


def numbers(name: str, integer: str = METAL) -> str:
    """The constants of a kernel; ``integer``: see :func:`constants`."""
    return constants(Scores, CodeSizes, TABLES[name], integer=integer)


def source(name: str) -> str:
    """The text of a Metal file of this package."""
    return files(__package__).joinpath(f"{name}.metal").read_text("utf-8")


@functools.lru_cache(maxsize=64)
def _scale(scale: float) -> mx.array:
    """The scale of scores in powers of two."""
    return mx.array(np.array([scale * Scores.LOG2_E], np.float32))

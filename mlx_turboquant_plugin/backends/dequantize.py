"""Keys and values of one layer, full-precision tokens and codes side by side, in one launch.

One source, ``dequantize.metal``, serves both kinds of GPU.
"""

from collections.abc import Callable
from typing import Any

from ..codecs.kv_codec import KVCodec
from .inputs import MODEL, code_arrays, int_array, inverse_array, level_array, model_arrays
from .sizes import Dequantize
from .tokens import Pair, Places, Tokens

DEQUANTIZE = (
    "dequantize",
    "older_keys newer_keys older_values newer_values k0 k1 k2 key_scale key_zero v0 v1 v2 "
    f"value_scale value_zero key_rotation value_rotation {MODEL} places",
    "keys values kept_keys kept_values",
)


def lay_out(
    kernel: Callable[[str, str, str], Any], codec: KVCodec, tokens: Tokens, places: Places
) -> tuple[Pair, Pair]:
    """Zeros, sinks, tokens from codes, later full-precision tokens, and zeros.

    Args:
        kernel: see :class:`Fused`.
        codec: what made the codes.

    Returns:
        Keys and values (B, H, T, D), and those that are kept, (B, H, sinks + kept, D), in the
        dtypes of the full-precision tokens.
    """
    spec, (keys, values) = codec.spec, tokens.some
    batch, heads = keys.shape[:2]
    # Keys and values come from projections, with heads inside: so MLX copies nothing.
    swapped = tokens.newer and tuple(x.swapaxes(1, 2) for x in tokens.newer)
    # What is not there is not read.
    older: Any = tokens.older or swapped
    newer: Any = swapped or tokens.older
    counts = (
        tokens.older[0].shape[2] if tokens.older else 0,
        tokens.newer[0].shape[2] if tokens.newer else 0,
    )
    levels = level_array((spec.key_codec, spec.key_bits), (spec.value_codec, spec.value_bits))
    end = tokens.first_quantized + places.first_code + places.decoded
    rotary, model = model_arrays(levels, codec, end)
    key_codes = code_arrays(tokens.key_codes, spec.key_codec, batch * heads, -1)
    value_codes = code_arrays(tokens.value_codes, spec.value_codec, batch * heads, -2)
    # With those that make arrays large enough.
    quantized = key_codes[-1].shape[-1] if tokens.key_codes else 0
    numbers = (
        *(places.total, places.left, places.sinks, places.first_code, places.decoded),
        *(quantized, tokens.first_quantized, counts[0], places.first_full, places.full),
        *(places.first_kept, places.kept, heads, counts[1], *rotary),
    )
    dims = keys.shape[-1], values.shape[-1]
    shapes = [
        (batch, heads, count, dim)
        for count in (places.total, places.sinks + places.kept)
        for dim in dims
    ]
    out = kernel(*DEQUANTIZE)(
        inputs=[
            older[0],
            newer[0],
            older[1],
            newer[1],
            *key_codes,
            *value_codes,
            inverse_array(codec.key_rotation),
            inverse_array(codec.value_rotation),
            *model,
            int_array(*numbers),
        ],
        template=[
            ("KT", keys.dtype),
            ("VT", values.dtype),
            ("KEY_SCALE", key_codes[3].dtype),
            ("VALUE_SCALE", value_codes[3].dtype),
            ("DK", dims[0]),
            ("DV", dims[1]),
            ("KEY_BITS", spec.key_bits),
            ("KEY_SEGMENTS", spec.segments),
            ("VALUE_BITS", spec.value_bits),
            ("KEY_AFFINE", spec.key_codec == "affine"),
            ("VALUE_AFFINE", spec.value_codec == "affine"),
            ("BALANCED", codec.balance is not None),
            ("SORTED", codec.layout is not None),
            ("BIASED", codec.bias is not None),
        ],
        grid=(2 * _groups(places) * Dequantize.THREADS, batch * heads, 1),
        threadgroup=(Dequantize.THREADS, 1, 1),
        output_shapes=shapes,
        output_dtypes=[keys.dtype, values.dtype] * 2,
    )
    return tuple(out[:2]), tuple(out[2:])


def _groups(places: Places) -> int:
    """The threadgroups of each side and (sequence, head)."""
    tokens, tiles, first = Dequantize.TOKENS, 0, places.first_code
    if places.decoded:
        tiles = (first + places.decoded - 1) // tokens - first // tokens + 1
    others = places.total - places.decoded, places.sinks + places.kept
    return tiles + sum(-(-count // tokens) for count in others)

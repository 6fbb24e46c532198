"""Codes made in one launch on NVIDIA GPUs."""

import functools
from typing import Any, Optional

import mlx.core as mx

from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import ALL, Codes, KVCodec
from ..codecs.rotation import Rotation
from . import cuda_source, encodes
from .cuda_source import ENCODE_THREADS
from .inputs import MODEL, int_array, model_arrays

# Tokens of a block of encode.cu, which has a warp for each.
ENCODED = 32

# Bytes of older codes of a head that a block copies, and the most blocks that do.
COPIED = 2**16
MOST_COPYING = 64


def encode_keys(
    codec: KVCodec, keys: mx.array, start: int, older: Codes = (), part: slice = ALL
) -> Codes:
    """As :meth:`KVCodec.encode_keys`; Lloyd-Max codes in one launch."""
    spec = codec.spec
    if not encodes(spec.key_codec, keys):
        return codec.encode_keys(keys, start, older, part)
    known = codec.balance, codec.bias
    return _encode(keys, part, spec.key_bits, codec.key_rotation, True, older, start, *known)


def encode_values(
    codec: KVCodec, values: mx.array, older: Codes = (), part: slice = ALL
) -> Codes:
    """As :meth:`KVCodec.encode_values`; Lloyd-Max codes in one launch."""
    spec = codec.spec
    if not encodes(spec.value_codec, values):
        return codec.encode_values(values, older, part)
    return _encode(values, part, spec.value_bits, codec.value_rotation, False, older)


def _encode(
    x: mx.array,
    part: slice,
    bits: int,
    rotation: Rotation,
    channel_major: bool,
    older: Codes,
    start: int = 0,
    balance: Optional[mx.array] = None,
    bias: Optional[KeyBias] = None,
) -> Codes:
    """Codes of some tokens of ``x`` (B, H, T, D) after ``older`` ones.

    Args:
        part: which tokens.
        start: the position of the first vector.
        balance: fp32 (H, 1, D).
    """
    batch, heads, count, dim = x.shape
    first, end, _ = part.indices(count)
    length = end - first
    widths = [dim // 8] * 3 if bits == 3 else [dim * bits // 8]
    before = older[-1].shape[3 if channel_major else 2] if older else 0
    total = before + length
    copying = min(MOST_COPYING, -(-before * sum(widths) // COPIED))
    layout, model = model_arrays(rotation.array, balance, bias, start + length)
    older = older or (rotation.array.view(mx.uint8),) * (len(widths) + 1)
    codes = _encode_kernel(len(widths))(
        inputs=[x, *model, *older, int_array(first, length, start, before, *layout)],
        template=[
            ("DIM", dim),
            ("BITS", bits),
            ("CHANNEL_MAJOR", channel_major),
            ("BALANCED", balance is not None),
            ("BIASED", bias is not None),
            ("UNIT", 1 if before % 16 or total % 16 else 16),
        ],
        grid=((-(-length // ENCODED) + copying) * ENCODE_THREADS, heads, batch),
        threadgroup=(ENCODE_THREADS, 1, 1),
        output_shapes=[
            (batch, heads, width, total) if channel_major else (batch, heads, total, width)
            for width in (*widths, 1)
        ],
        output_dtypes=[mx.uint8] * (len(widths) + 1),
    )
    return tuple(codes)


# The last blocks of each head copy.
BODY = """
  unsigned char* planes[] = {{{planes}}};
  const unsigned char* older_planes[] = {{{older}}};
  int first = places[0], length = places[1], start = places[2], before = places[3];
  int encoding = (length + ENCODED - 1) / ENCODED;
  if (blockIdx.x >= encoding) {{
    copy_codes<DIM, BITS, CHANNEL_MAJOR, UNIT>(
        older_planes, older_scales, planes, scales, before, before + length,
        blockIdx.x - encoding, gridDim.x - encoding);
    return;
  }}
  RotaryPairs rotary = {{fine, coarse_cos, coarse_sin, places[4], places[5], places[6]}};
  encode_vectors<DIM, BITS, CHANNEL_MAJOR, BALANCED, BIASED>(
      x + ((long long)(blockIdx.z * gridDim.y + blockIdx.y) * x_shape[2] + first) * DIM, length,
      before, start, rotation, balance, bias, rotary, planes, scales);
"""


@functools.lru_cache(maxsize=None)
def _encode_kernel(planes: int) -> Any:
    outputs = ["low", "mid", "high"][:planes]
    older = [f"older_{name}" for name in outputs]
    names = MODEL.replace("levels", "rotation").split()
    inputs = ["x", *names, *older, "older_scales", "places"]
    body = BODY.format(planes=", ".join(outputs), older=", ".join(older))
    return cuda_source.kernel("encode", inputs, [*outputs, "scales"], body)

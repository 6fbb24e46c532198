"""Codes made in one launch on NVIDIA GPUs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ...codecs.kv_codec import ALL, Codes, KVCodec
from ...codecs.rotation import Rotation
from ..inputs import MODEL, int_array, model_arrays
from ..sizes import BlockEncode
from ..support import encodes
from . import source

# Bytes of older codes of a head that a block copies, and the most blocks that do.
COPIED = 2**16
MOST_COPYING = 64


def encode(
    codec: KVCodec,
    keys: mx.array,
    values: mx.array,
    start: int,
    older: tuple[Codes, Codes] = ((), ()),
    part: slice = ALL,
) -> tuple[Codes, Codes]:
    """As :meth:`KVCodec.encode`; codes of both in one launch, unless affine."""
    spec = codec.spec
    sides = []
    if encodes(spec.key_codec, keys):
        sides.append(_Side(keys, spec.key_bits, spec.segments, codec.key_rotation, True, older[0]))
    if encodes(spec.value_codec, values):
        sides.append(_Side(values, spec.value_bits, 1, codec.value_rotation, False, older[1]))
    made = iter(_encode(codec, sides, start, part) if sides else ())
    return (
        next(made)
        if encodes(spec.key_codec, keys)
        else codec.encode_keys(keys, start, older[0], part),
        next(made)
        if encodes(spec.value_codec, values)
        else codec.encode_values(values, older[1], part),
    )


class _Side(NamedTuple):
    """Keys or values (B, H, T, D) that get codes, and the codes before theirs."""

    x: mx.array
    bits: int
    segments: int
    rotation: Rotation
    is_keys: bool
    older: Codes

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a vector in each plane, and of its scales."""
        dim = self.x.shape[-1]
        return (*([dim // 8] * 3 if self.bits == 3 else [dim * self.bits // 8]), self.segments)


def _encode(codec: KVCodec, sides: Sequence[_Side], start: int, part: slice) -> Sequence[Codes]:
    batch, heads, count, _ = sides[0].x.shape
    first, end, _ = part.indices(count)
    length = end - first
    before = _tokens(sides[0])
    total = before + length
    rotation = sides[0].rotation.array
    known = codec if sides[0].is_keys else None
    feedback = known and known.feedback
    rotary, model = model_arrays(rotation, known, start + length)
    inputs, copying, template = [], [], []
    for name, side in zip("kv" if len(sides) == 2 else "kv"[not sides[0].is_keys], sides):
        copying.append(min(MOST_COPYING, -(-before * sum(side.widths) // COPIED)))
        # What is not there is not read.
        older = side.older or (rotation.view(mx.uint8),) * len(side.widths)
        inputs += [side.x, side.rotation.array, *older]
        numbers = ("DIM", side.x.shape[-1]), ("BITS", side.bits), ("SEGMENTS", side.segments)
        template += [(f"{name.upper()}_{number}", x) for number, x in numbers]
    shapes = [
        (batch, heads, width, total) if side.is_keys else (batch, heads, total, width)
        for side in sides
        for width in side.widths
    ]
    tokens = BlockEncode.tokens(max(side.x.shape[-1] for side in sides))
    blocks = len(sides) * -(-length // tokens) + sum(copying)
    made = _encode_kernel(tuple((side.is_keys, len(side.widths) - 1) for side in sides))(
        inputs=[
            *inputs,
            *model[1:],
            model[0] if feedback is None else feedback,
            int_array(first, length, start, before, *rotary, *copying),
        ],
        template=[
            *template,
            ("BALANCED", known is not None and known.balance is not None),
            ("SORTED", known is not None and known.layout is not None),
            ("FED_BACK", feedback is not None),
            ("BIASED", known is not None and known.bias is not None),
            ("UNIT", 1 if before % 16 or total % 16 else 16),
        ],
        grid=(blocks * 32 * tokens, heads, batch),
        threadgroup=(32 * tokens, 1, 1),
        output_shapes=shapes,
        output_dtypes=[mx.uint8] * len(shapes),
    )
    planes = iter(made)
    return [tuple(next(planes) for _ in side.widths) for side in sides]


def _tokens(side: _Side) -> int:
    return side.older[-1].shape[3 if side.is_keys else 2] if side.older else 0


BODY = """
  constexpr int WIDEST = {widest};
  constexpr int TOKENS = WIDEST > WIDE ? WIDE_ENCODED : ENCODED;
  __shared__ float vectors[TOKENS * WIDEST];
  __shared__ unsigned char codes[TOKENS * (WIDEST + 4)];
  int first = places[0], length = places[1], start = places[2], before = places[3];
  RotaryPairs rotary = {{fine, coarse_cos, coarse_sin, places[4], places[5], places[6]}};
  Known known = {{balance, layout, bias, rotary}};
  int encoding = (length + TOKENS - 1) / TOKENS, block = blockIdx.x;
  long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y;
"""

# A side's first blocks encode, its last ones copy.
SIDE_BODY = """
  {{
    constexpr int DIM = {NAME}_DIM, BITS = {NAME}_BITS, SEGMENTS = {NAME}_SEGMENTS;
    unsigned char* planes[] = {{{planes}}};
    const unsigned char* older_planes[] = {{{older}}};
    int copying = places[{place}];
    if (block < encoding) {{
      encode_vectors<
          TOKENS, DIM, BITS, SEGMENTS, {is_keys}, BALANCED && {is_keys}, SORTED && {is_keys},
          BIASED && {is_keys}>(
          {name} + (head * {name}_shape[2] + first) * DIM, length, before, start, {name}_rotation,
          known, FED_BACK && {is_keys} ? feedback : nullptr, planes, {name}_scales, vectors, codes,
          block);
      return;
    }}
    block -= encoding;
    if (block < copying) {{
      copy_codes<TOKENS, DIM, BITS, SEGMENTS, {is_keys}, UNIT>(
          older_planes, older_{name}_scales, planes, {name}_scales, before, before + length, block,
          copying);
      return;
    }}
    block -= copying;
  }}
"""


@functools.cache
def _encode_kernel(sides: tuple[tuple[bool, int], ...]) -> Any:
    """The kernel for sides, of which each are keys or not, and have so many planes."""
    inputs, outputs, bodies, names = [], [], [], []
    for index, (is_keys, count) in enumerate(sides):
        name = "k" if is_keys else "v"
        planes = [f"{name}_{plane}" for plane in ("low", "mid", "high")[:count]]
        older = [f"older_{plane}" for plane in planes]
        inputs += [name, f"{name}_rotation", *older, f"older_{name}_scales"]
        outputs += [*planes, f"{name}_scales"]
        names.append(f"{name.upper()}_DIM")
        bodies.append(
            SIDE_BODY.format(
                name=name,
                NAME=name.upper(),
                planes=", ".join(planes),
                older=", ".join(older),
                place=7 + index,
                is_keys=str(is_keys).lower(),
            )
        )
    widest = names[0] if len(names) == 1 else "(K_DIM > V_DIM ? K_DIM : V_DIM)"
    body = BODY.format(widest=widest) + "".join(bodies)
    inputs += [*MODEL.split()[1:], "feedback", "places"]
    return source.kernel("encode", inputs, outputs, body)

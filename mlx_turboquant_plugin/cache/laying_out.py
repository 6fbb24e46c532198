"""The tokens of one layer side by side, codes dequantized: by a kernel, or by operations."""

from typing import Protocol

import mlx.core as mx

from ..backends import Backend
from ..backends.tokens import Pair, Places, Tokens
from ..codecs.kv_codec import Codes, KVCodec
from .full_precision import FullPrecisionTokens


class Source(Protocol):
    """What has tokens: see :class:`View` and :class:`BatchedRows`."""

    @property
    def codec(self) -> KVCodec: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def full_tokens(self) -> FullPrecisionTokens: ...
    @property
    def key_codes(self) -> Codes: ...
    @property
    def value_codes(self) -> Codes: ...
    @property
    def first_quantized(self) -> int: ...


def laid_out(source: Source, places: Places) -> Pair:
    """Keys and values (B, H, T, D), in the dtypes of the full-precision ones, as ``places`` says.

    On a GPU, where a kernel joins the full-precision tokens on its way.
    """
    full = source.full_tokens
    unjoined = full.unjoined
    if unjoined is None:
        older, newer, drop = (full.keys, full.values), None, 0
    else:
        older = unjoined.keys, unjoined.values
        newer, drop = (unjoined.new_keys, unjoined.new_values), unjoined.drop
    tokens = Tokens(older, newer, source.key_codes, source.value_codes, source.first_quantized)
    if not source.backend.lays_out(source.codec, tokens):
        return laid_out_by_operations(source, places)
    codec = source.codec if places.decoded else source.codec.plain
    kept = full.count - places.sinks
    joins = newer is not None and kept > 0
    places = places._replace(first_full=places.first_full + drop)
    if joins:
        places = places._replace(first_kept=places.sinks + drop, kept=kept)
    pair, joined = source.backend.lay_out(codec, tokens, places)
    if joins:
        full.join(*joined)
    return pair


def laid_out_by_operations(source: Source, places: Places) -> Pair:
    """The same on any device."""
    out: list[mx.array] = []
    decoded: tuple[mx.array | None, ...] = None, None
    if places.decoded:
        first, last = places.first_code, places.first_code + places.decoded
        key_codes, value_codes = code_range(source.key_codes, source.value_codes, first, last)
        decoded = (
            source.codec.decode_keys(key_codes, source.first_quantized + first),
            source.codec.decode_values(value_codes),
        )
    last_full = places.first_full + places.full
    for x, codes in zip((source.full_tokens.keys, source.full_tokens.values), decoded):
        parts = [x[:, :, : places.sinks], x[:, :, places.first_full : last_full]]
        if codes is not None:
            parts.insert(1, codes.astype(x.dtype))
        joined = mx.concatenate(parts, axis=2)
        right = places.total - places.left - joined.shape[2]
        if places.left or right:
            joined = mx.pad(joined, [(0, 0), (0, 0), (places.left, right), (0, 0)])
        out.append(joined)
    keys, values = out
    return keys, values


def code_range(key_codes: Codes, value_codes: Codes, first: int, last: int) -> tuple[Codes, Codes]:
    """The tokens first, ..., last - 1 of codes, in arrays of their own.

    Elementwise work on strided arrays is slow, copying packed codes is not.
    """
    return (
        tuple(_cut_last_axis(plane, first, last) for plane in key_codes),
        tuple(_cut_tokens(plane, first, last) for plane in value_codes),
    )


def _cut_last_axis(plane: mx.array, first: int, last: int) -> mx.array:
    # MLX copies words as fast as it copies bytes.
    if plane.dtype == mx.uint8 and not (first % 4 or last % 4 or plane.shape[-1] % 4):
        words = plane.view(mx.uint32)[..., first // 4 : last // 4]
        return mx.contiguous(words).view(mx.uint8)
    return mx.contiguous(plane[..., first:last])


def _cut_tokens(plane: mx.array, first: int, last: int) -> mx.array:
    if plane.dtype == mx.uint8 and plane.shape[-1] % 4 == 0:
        return mx.contiguous(plane.view(mx.uint32)[..., first:last, :]).view(mx.uint8)
    return mx.contiguous(plane[..., first:last, :])

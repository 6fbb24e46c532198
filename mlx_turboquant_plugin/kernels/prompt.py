"""What a pass over part of a prompt does to one layer's cache, described once for all layers.

Describing launches to MLX takes longer than running them, and all layers launch the same:
each pass is traced by ``mx.compile`` for the first layer and repeated for the others.
"""

import functools
import threading
from typing import Callable, NamedTuple, Optional, Tuple

import mlx.core as mx

from ..codecs.key_bias import RotaryTable
from ..codecs.kv_codec import Codes, CodecSpec, KVCodec
from . import encodes, fused_kernel
from .dequantize import Side, dequantize

Pair = Tuple[mx.array, mx.array]


class Places(NamedTuple):
    """Which tokens are read and written, by their places among codes and among exact tokens.

    Attributes:
        first_coded: the position of the first code.
        sinks: how many exact tokens come first in all that is made.
        first_code, decoded: the codes that the queries read; 0 if none.
        first_exact, exact: the exact tokens that they read after the sinks.
        start, first_encoded, encoded: the position and the place of the first exact token
            that becomes a code, and how many do.
        first_kept, kept: the exact tokens that stay after the sinks.
    """

    first_coded: int
    sinks: int
    first_code: int
    decoded: int
    first_exact: int
    exact: int
    start: int
    first_encoded: int
    encoded: int
    first_kept: int
    kept: int


class Pass(NamedTuple):
    """What a pass makes.

    Attributes:
        laid_out: keys and values (B, H, T, D) that its queries read, sinks, decoded and exact
            tokens; None if no codes are read.
        kept: the exact tokens that stay, (B, H, E, D).
        key_codes, value_codes: all there are now.
    """

    laid_out: Optional[Pair]
    kept: Pair
    key_codes: Codes
    value_codes: Codes


class _Bias(NamedTuple):
    """A layer's key bias as :func:`model_arrays` reads it."""

    bias: mx.array
    table: RotaryTable


def can_pass(codec: KVCodec, keys: mx.array, values: mx.array) -> bool:
    """Whether kernels make and read the codes of ``keys`` and ``values`` (B, H, N, D)."""
    spec = codec.spec
    return encodes(spec.key_codec, keys) and encodes(spec.value_codec, values)


def run_pass(
    kernel: str,
    codec: KVCodec,
    older: Optional[Pair],
    newer: Pair,
    key_codes: Codes,
    value_codes: Codes,
    places: Places,
) -> Pass:
    """Dequantise, encode and drop, for one layer.

    Args:
        kernel: a fused one.
        older: exact keys and values (B, H, E, D) from before, or None.
        newer: those of the pass, (B, H, N, D).
    """
    bias = codec.bias
    run = _traced(
        threading.get_ident(),
        kernel,
        codec.spec,
        codec.balance is not None,
        bias and bias.table,
        older and older[0].shape[2],
        tuple(newer[0].shape),
        newer[0].dtype,
        newer[1].dtype,
        key_codes[-1].shape[-1] if key_codes else 0,
        places,
    )
    known = [codec.balance] if codec.balance is not None else []
    if bias is not None:
        known.append(bias.bias)
    return Pass(*run(older or (), newer, key_codes, value_codes, known))


# Prompts have passes of a few kinds, and other prompts the same.
@functools.lru_cache(maxsize=64)
def _traced(
    thread: int,
    kernel: str,
    spec: CodecSpec,
    balanced: bool,
    table: Optional[RotaryTable],
    older_count: Optional[int],
    shape: Tuple[int, ...],
    key_dtype: mx.Dtype,
    value_dtype: mx.Dtype,
    coded: int,
    places: Places,
) -> Callable:
    """:func:`run_pass` for one kind of layer.

    Args:
        thread: the one that calls it: MLX keeps traces by thread.
        balanced, table: whether keys are balanced, and the rotary table of a bias.
        older_count, shape, key_dtype, value_dtype, coded: of the arrays that it is given.
    """
    coder = fused_kernel(kernel)

    def run(older, newer, key_codes, value_codes, known):
        balance = known[0] if balanced else None
        codec = KVCodec(spec, balance, table and _Bias(known[-1], table))
        tokens = zip(older, newer) if older else ((x, None) for x in newer)
        key_tokens, value_tokens = tokens
        sides = (
            Side(
                *key_tokens,
                spec.key_codec,
                spec.key_bits,
                key_codes,
                True,
                places.first_coded,
                codec.key_rotation,
                codec.balance,
                codec.bias,
            ),
            Side(
                *value_tokens,
                spec.value_codec,
                spec.value_bits,
                value_codes,
                False,
                places.first_coded,
                codec.value_rotation,
            ),
        )
        laid_out, first = None, places.first_encoded
        if places.decoded:
            laid_out = tuple(_laid_out(kernel, side, places) for side in sides)
            read = laid_out
            first += places.sinks + places.decoded - places.first_exact
        else:
            read = tuple(map(_all_exact, (key_tokens, value_tokens)))
        keys, values = read
        part = slice(first, first + places.encoded)
        key_codes = coder.encode_keys(codec, keys, places.start, key_codes, part)
        value_codes = coder.encode_values(codec, values, value_codes, part)
        kept = tuple(_kept(kernel, side, places) for side in sides)
        return laid_out, kept, key_codes, value_codes

    return mx.compile(run)


def _laid_out(kernel: str, side: Side, places: Places) -> mx.array:
    return dequantize(
        kernel,
        side,
        sinks=places.sinks,
        first_code=places.first_code,
        decoded=places.decoded,
        first_exact=places.first_exact,
        exact=places.exact,
        total=places.sinks + places.decoded + places.exact,
    )


def _kept(kernel: str, side: Side, places: Places) -> mx.array:
    return dequantize(
        kernel,
        side,
        sinks=places.sinks,
        first_exact=places.first_kept,
        exact=places.kept,
        total=places.sinks + places.kept,
    )


def _all_exact(tokens: Tuple[mx.array, Optional[mx.array]]) -> mx.array:
    older, newer = tokens
    return older if newer is None else mx.concatenate(tokens, axis=2)

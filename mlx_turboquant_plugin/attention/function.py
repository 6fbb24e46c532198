"""Dequantization and attention as functions of arrays.

The softmax runs over the full-precision tokens and over pieces of the quantized ones, keeping
running maxima and totals (online softmax: Milakov and Gimelshein, arXiv 1805.02867), so that no
more than a piece is ever dequantized. Splits of the tokens can be summed apart.

The same functions are the eager tier and, under ``mx.compile``, the compiled one. They
use no operation that looks at the number of tokens: a single trace serves every length
(``shapeless=True``), and all layers of the same head dims share it. A trace does keep the
head dims of its first call, such as the factor of the Hadamard transform.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from .. import compiling
from ..codecs.exponential import exp
from ..codecs.kv_codec import CodecSpec, key_quantizer, value_quantizer
from ..codecs.rotation import Rotation

# Finite, so that a row without any visible token stays a number.
MASKED = -1e30

# Over some tokens: the highest score (B, H, R, 1), and, of e to the power of each score less
# that, the total (B, H, R, 1) and the sum of values weighed with it (B, H, R, D_v).
Sums = tuple[mx.array, mx.array, mx.array]


class AttentionFunctions(NamedTuple):
    """Attention in steps. All arrays are fp32 but for the full-precision tokens and the codes.

    R counts the query heads of a KV head times the query positions. Masks are bool
    or additive and broadcast to the scores, and may be None.

    Attributes:
        rotate: (queries (B, H, R, D), scaled, balanced and sorted; rotation of keys) to what
            is multiplied with codes.
        begin: (queries as above; full-precision keys and values (B, H, E, D); mask; scores of
            learned sinks, tokens without values, (H, R, 1) or None) to the sums over the
            full-precision tokens.
        fold: (rotated queries; running sums or None; keys and values of C tokens, as the
            quantizers expand them; bias scores (B, H, R, C) or None; mask) to the running
            sums with these tokens. Values stay rotated.
        finish: (sums over the full-precision tokens; a list of running sums over splits of the
            quantized ones; rotation of values) to the output (B, H, R, D_v).
    """

    rotate: Callable
    begin: Callable
    fold: Callable
    finish: Callable


@functools.cache
def attention_functions(spec: CodecSpec, compiled: bool) -> AttentionFunctions:
    """The functions for one kind of codec, as they are or under ``mx.compile``."""
    keys = key_quantizer(spec.key_codec, spec.key_bits)
    values = value_quantizer(spec.value_codec, spec.value_bits, spec.value_dim)

    def rotate(queries, rotation):
        if spec.segments == 1:
            return Rotation.forward(queries, rotation)
        # The segments as matrices of their own, (B, H, 2, R, D / 2).
        parts = mx.unflatten(queries, -1, (spec.segments, -1))
        return Rotation.forward(mx.swapaxes(parts, -2, -3), rotation)

    def begin(queries, full_keys, full_values, mask, sink_scores):
        scores = queries @ mx.swapaxes(full_keys, -1, -2).astype(mx.float32)
        scores = _masked(scores, mask)
        top = mx.max(scores, axis=-1, keepdims=True)
        if sink_scores is not None:
            top = mx.maximum(top, sink_scores)
        weights = exp(scores - top)
        total = mx.sum(weights, axis=-1, keepdims=True)
        if sink_scores is not None:
            total = total + mx.exp(sink_scores - top)
        return top, total, weights @ full_values.astype(mx.float32)

    def fold(rotated, sums, expanded_keys, expanded_values, bias, mask):
        scores = keys.scores(rotated, *expanded_keys)
        if bias is not None:
            scores = scores + bias
        scores = _masked(scores, mask)
        top = mx.max(scores, axis=-1, keepdims=True)
        if sums is not None:
            top = mx.maximum(top, sums[0])
        weights = exp(scores - top)
        total = mx.sum(weights, axis=-1, keepdims=True)
        out = values.mix(weights, *expanded_values)
        return (top, total, out) if sums is None else _added(top, sums, (top, total, out))

    def finish(full, quantized, rotation):
        top = functools.reduce(mx.maximum, (sums[0] for sums in (full, *quantized)))
        _, total, out = _added(top, full)
        if quantized:
            _, quantized_total, rotated_out = _added(top, *quantized)
            total = total + quantized_total
            out = out + Rotation.inverse(rotated_out, rotation)
        return out / total

    functions: tuple[Callable, ...] = (rotate, begin, fold, finish)
    return AttentionFunctions(*(map(compiling.compiled, functions) if compiled else functions))


def _added(top: mx.array, *sums: Sums) -> Sums:
    """The sums over all tokens of ``sums``, none of which has a score above ``top``."""
    shrinks = [mx.exp(own_top - top) for own_top, _, _ in sums]
    total: Any = sum(total * shrink for shrink, (_, total, _) in zip(shrinks, sums))
    out: Any = sum(out * shrink for shrink, (_, _, out) in zip(shrinks, sums))
    return top, total, out


def _masked(scores: mx.array, mask: mx.array | None) -> mx.array:
    if mask is None:
        return scores
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, MASKED)
    return scores + mask

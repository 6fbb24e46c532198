"""Dequantisation and attention as functions of arrays.

The softmax runs over the exact tokens first and then over pieces of the coded ones,
keeping a running maximum and total (online softmax: Milakov and Gimelshein, arXiv
1805.02867), so that no more than a piece is ever dequantised.

The same functions are the eager tier and, under ``mx.compile``, the compiled one. They
use no operation that looks at the number of tokens: a single trace serves every length
(``shapeless=True``), and all layers of the same head dims share it. A trace does keep the
head dims of its first call, such as the factor of the Hadamard transform.
"""

import functools
from typing import Callable, NamedTuple, Optional

import mlx.core as mx

from ..codecs.exponential import exp
from ..codecs.kv_codec import CodecSpec, key_quantizer, value_quantizer
from ..codecs.rotation import Rotation

# Finite, so that a row without any visible token stays a number.
MASKED = -1e30

_traces = 0


def trace_count() -> int:
    """How often functions of compiled attention have been traced in this process."""
    return _traces


class AttentionFunctions(NamedTuple):
    """Attention in steps. All arrays are fp32 but for the exact tokens and the codes.

    R counts the query heads of a KV head times the query positions. Masks are bool
    or additive and broadcast to the scores, and may be None.

    Attributes:
        begin: (queries (B, H, R, D), scaled; exact keys and values (B, H, E, D);
            rotation of keys; balance or None; mask; scores of learned sinks, tokens
            without values, (H, R, 1) or None) to (rotated queries, running sums) over
            the exact tokens.
        expand: (key codes, value codes) to what the quantisers make products with.
        fold: (rotated queries, running sums, expanded keys and values of C tokens,
            bias scores (B, H, R, C) or None, mask) to the running sums with them.
        finish: (running sums, rotation of values) to the output (B, H, R, D_v).
    """

    begin: Callable
    expand: Callable
    fold: Callable
    finish: Callable


@functools.lru_cache(maxsize=None)
def attention_functions(spec: CodecSpec, compiled: bool) -> AttentionFunctions:
    """The functions for one kind of codec, as they are or under ``mx.compile``."""
    keys = key_quantizer(spec.key_codec, spec.key_bits)
    values = value_quantizer(spec.value_codec, spec.value_bits, spec.value_dim)

    def begin(queries, exact_keys, exact_values, rotation, balance, mask, sink_scores):
        scores = queries @ mx.swapaxes(exact_keys, -1, -2).astype(mx.float32)
        scores = _masked(scores, mask)
        top = mx.max(scores, axis=-1, keepdims=True)
        if sink_scores is not None:
            top = mx.maximum(top, sink_scores)
        weights = exp(scores - top)
        total = mx.sum(weights, axis=-1, keepdims=True)
        if sink_scores is not None:
            total = total + mx.exp(sink_scores - top)
        out = weights @ exact_values.astype(mx.float32)
        rotated = Rotation.forward(queries if balance is None else queries * balance, rotation)
        # zeros_like() would keep the shape of the first trace.
        return rotated, (top, total, out, out * 0)

    def expand(key_codes, value_codes):
        return keys.expand(key_codes), values.expand(value_codes)

    def fold(rotated, sums, expanded_keys, expanded_values, bias, mask):
        top, total, out, rotated_out = sums
        scores = keys.scores(rotated, *expanded_keys)
        if bias is not None:
            scores = scores + bias
        scores = _masked(scores, mask)
        new_top = mx.maximum(top, mx.max(scores, axis=-1, keepdims=True))
        weights = exp(scores - new_top)
        shrink = mx.exp(top - new_top)
        total = total * shrink + mx.sum(weights, axis=-1, keepdims=True)
        rotated_out = rotated_out * shrink + values.mix(weights, *expanded_values)
        return new_top, total, out * shrink, rotated_out

    def finish(sums, rotation):
        _, total, out, rotated_out = sums
        return (out + Rotation.inverse(rotated_out, rotation)) / total

    functions = (begin, expand, fold, finish)
    return AttentionFunctions(*(map(_compiled, functions) if compiled else functions))


def _compiled(function: Callable) -> Callable:
    def traced(*args):
        global _traces
        _traces += 1
        return function(*args)

    return mx.compile(traced, shapeless=True)


def _masked(scores: mx.array, mask: Optional[mx.array]) -> mx.array:
    if mask is None:
        return scores
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, MASKED)
    return scores + mask

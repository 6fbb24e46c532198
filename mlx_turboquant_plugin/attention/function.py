"""Dequantisation and attention as one function of arrays.

The same function is the eager tier and, under ``mx.compile``, the compiled one. It
uses no operation that looks at the number of tokens, so a single trace serves
every length (``shapeless=True``), and one compiled function serves all layers.
"""

import functools
from typing import Any, Callable, Optional

import mlx.core as mx

from ..codecs.rotation import Rotation

# Finite, so that a row without any visible token stays a number.
MASKED = -1e30

_traces = 0


def trace_count() -> int:
    """How often compiled attention has been traced in this process."""
    return _traces


@functools.lru_cache(maxsize=None)
def attention_function(keys: Any, values: Any, compiled: bool) -> Callable:
    """The attention over exact tokens and codes, for a pair of quantisers.

    Args:
        keys, values: the quantisers of the codes.
        compiled: run it under ``mx.compile``.

    Returns:
        A function of (queries, exact keys, exact values, key codes, value codes,
        rotations, balance, bias scores, exact mask, code mask) that returns fp32
        (B, H, R, D). Queries are fp32 (B, H, R, D) and scaled, R counting the query
        heads of a KV head and the query positions; rotations is the pair of the
        keys' and the values' arrays; balance, bias scores (B, H, R, C) and the masks,
        bool (..., R, E) and (..., R, C) or additive, may be None.
    """

    def attend(
        queries, exact_keys, exact_values, key_codes, value_codes, rotations, balance, bias,
        exact_mask, code_mask,
    ):  # fmt: skip
        key_rotation, value_rotation = rotations
        exact = queries @ mx.swapaxes(exact_keys, -1, -2).astype(mx.float32)
        rotated = queries if balance is None else queries * balance
        coded = keys.scores(Rotation.forward(rotated, key_rotation), key_codes)
        if bias is not None:
            coded = coded + bias
        exact, coded = _masked(exact, exact_mask), _masked(coded, code_mask)
        # One softmax over both parts without joining them.
        top = mx.maximum(
            mx.max(exact, axis=-1, keepdims=True), mx.max(coded, axis=-1, keepdims=True)
        )
        exact, coded = mx.exp(exact - top), mx.exp(coded - top)
        total = mx.sum(exact, axis=-1, keepdims=True) + mx.sum(coded, axis=-1, keepdims=True)
        out = Rotation.inverse(values.mix(coded, value_codes), value_rotation)
        return (out + exact @ exact_values.astype(mx.float32)) / total

    if not compiled:
        return attend

    def traced(*args):
        global _traces
        _traces += 1
        return attend(*args)

    return mx.compile(traced, shapeless=True)


def _masked(scores: mx.array, mask: Optional[mx.array]) -> mx.array:
    if mask is None:
        return scores
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, MASKED)
    return scores + mask

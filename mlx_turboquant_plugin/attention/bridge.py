"""``TURBOQUANT_BYPASS=bridge``: dequantise, then mlx-lm's own attention.

Slow and simple. What it shares with the other kernels is the codec, so a
difference to them is an error of their attention, and a difference to the
uncompressed model is an error of the codec.
"""

from typing import Callable

import mlx.core as mx

from ..cache.view import View
from ..cache.visibility import BLOCK


def attend_bridge(
    original: Callable, queries: mx.array, view: View, scale: float, mask, learned_sinks=None
) -> mx.array:
    """Attention of ``queries`` (B, H_q, N, D) over a view, one block of queries at a time."""
    codec, sinks = view.codec, view.sinks
    _, oldest = view.oldest(0)
    key_codes, value_codes = view.codes(oldest, view.coded)
    decoded = codec.decode_keys(key_codes, oldest), codec.decode_values(value_codes)
    out, first = [], view.start
    while first < view.end:
        last = min(view.end, (first // BLOCK + 1) * BLOCK)
        exact_from = max(oldest, view.exact_from(first))
        seen_to = last if isinstance(mask, str) else view.end
        keys, values = (
            mx.concatenate(
                [x[:, :, :sinks], d[:, :, : exact_from - oldest].astype(x.dtype), x[:, :, sinks:]],
                axis=2,
            )
            for x, d in zip(view.exact(exact_from, seen_to), decoded)
        )
        rows = slice(first - view.start, last - view.start)
        part = mask[..., rows, :] if isinstance(mask, mx.array) else mask
        out.append(
            original(
                queries[:, :, rows],
                keys,
                values,
                cache=None,
                scale=scale,
                mask=part,
                sinks=learned_sinks,
            )
        )
        first = last
    return mx.concatenate(out, axis=2)

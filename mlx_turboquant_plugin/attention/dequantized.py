"""Attention by MLX's own fused function, over keys and values dequantized for one layer.

So GPUs process prompts: a layer's codes are dequantized once for all queries, into the
arrays that MLX is given, and nothing of it outlives the layer.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..backends.tokens import Places
from ..cache.batch_view import RowView
from ..cache.batched_rows import BatchedRows
from ..cache.causal import Mask
from ..cache.laying_out import laid_out
from ..cache.view import View
from ..cache.visibility import ROLLBACK
from .layout import Layout, Row, combined_mask, layout_of
from .pacing import paced

# On NVIDIA GPUs MLX prepares a graph for each number of tokens that a mask is for, in 65 ms:
# steps of a few tokens have them in multiples of this.
STEP = 256


def attend_dequantized(
    original: Callable,
    queries: mx.array,
    view: View,
    scale: float,
    mask: Mask,
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attention of ``queries`` (B, H_q, N, D) over a view; returns (B, H_q, N, D_v).

    Args:
        original: mlx-lm's own function.
        mask: None, "causal", or an array (B or 1, H_q or 1, N, T) over the tokens that the
            first query sees.
        learned_sinks: (H_q,), or None.
    """
    if view.laid_out is not None:
        # In the order of time, and each once: the mask for mlx-lm's own cache is that for them.
        keys, values = view.laid_out
    else:
        layout = layout_of(view)
        row = Row.of(view, layout)
        if layout.repeats or view.plan.forgets:
            if not view.plan.is_prompt:
                total = _in_steps(layout.total)
                layout = layout._replace(left=total - layout.total, total=total)
                row = row._replace(layout=layout)
            mask = combined_mask([row], queries.shape[2], mask, [None], queries.dtype)
        keys, values = _laid_out(view, layout, view.plan.slot(layout.full.start))
    out = original(queries, keys, values, cache=None, scale=scale, mask=mask, sinks=learned_sinks)
    return _paced(out, keys, values, view)


def _paced(out: mx.array, keys: mx.array, values: mx.array, view: View) -> mx.array:
    if view.queries <= ROLLBACK:
        return out
    return paced(out, keys.nbytes + values.nbytes, view.plan.start, view.codec)


def attend_rows_dequantized(
    original: Callable,
    queries: mx.array,
    rows: Sequence[RowView],
    scale: float,
    mask: Mask,
    left_padding: Sequence[int],
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """The same for the rows of a batch, all in one call.

    Args:
        rows: at least one has tokens.
        mask: None, "causal", or an array (B or 1, H_q or 1, N, T) for mlx-lm's BatchKVCache.
        left_padding: of each row, as BatchKVCache counts it.
    """
    count = queries.shape[2]
    some = next(row.view for row in rows if row.view is not None)
    layouts = [Layout() if row.view is None else layout_of(row.view) for row in rows]
    # The newest tokens stand where the queries do; what comes after a row's last is hidden by
    # being later than its queries.
    after = [count - row.last for row in rows]
    total = max(layout.tokens + right for layout, right in zip(layouts, after))
    if not some.plan.is_prompt:
        total = _in_steps(total)
    layouts = [
        layout._replace(left=total - right - layout.tokens, total=total)
        for layout, right in zip(layouts, after)
    ]
    known = [
        Row(layout, 0, row.first, 0, True, some.plan.visibility)
        if row.view is None
        else Row.of(row.view, layout, row.first)
        for row, layout in zip(rows, layouts)
    ]
    if not isinstance(mask, str) or any(
        layout.left or row.first or layout.repeats or row.view.plan.forgets
        for row, layout in zip(rows, layouts)
        if row.view is not None
    ):
        mask = combined_mask(known, count, mask, left_padding, queries.dtype)
    pairs = [
        _zeros(some, total)
        if row.view is None
        else _laid_out(row.view, layout, row.view.plan.slot(layout.full.start))
        for row, layout in zip(rows, layouts)
    ]
    keys, values = (mx.concatenate(list(side)) for side in zip(*pairs))
    out = original(queries, keys, values, cache=None, scale=scale, mask=mask, sinks=learned_sinks)
    return _paced(out, keys, values, some)


def attend_batched_dequantized(
    original: Callable,
    queries: mx.array,
    batched: BatchedRows,
    scale: float,
    mask: Mask,
    left_padding: Sequence[int],
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """The same for the newest token of all batched rows."""
    sinks, held = batched.visibility.sinks, batched.full_tokens.count
    quantized = max(sinks, max(batched.quantized))
    total = _in_steps(held + quantized - sinks)
    layouts = [
        Layout(sinks, range(sinks, quantized), range(length - held + sinks, length), 0, total)
        for length in batched.lengths
    ]
    rows = [
        Row(layout, length - 1, 0, full_start, False, batched.visibility)
        for layout, length, full_start in zip(layouts, batched.lengths, batched.full_start)
    ]
    mask = combined_mask(rows, 1, mask, left_padding, queries.dtype)
    keys, values = _laid_out(batched, layouts[0], sinks)
    return original(queries, keys, values, cache=None, scale=scale, mask=mask, sinks=learned_sinks)


def _in_steps(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def _laid_out(source: View | BatchedRows, layout: Layout, slot: int) -> tuple[mx.array, mx.array]:
    """Keys and values (B, H, T, D), in the dtypes of the full-precision ones, as ``layout`` says.

    Args:
        slot: where the first of the full-precision tokens stands among those that the source holds.
    """
    ready = getattr(source, "laid_out", None)
    if ready is not None and layout.tokens == layout.total:
        return ready
    places = Places(
        left=layout.left,
        sinks=layout.sinks,
        first_code=layout.decoded.start - source.first_quantized if layout.decoded else 0,
        decoded=len(layout.decoded),
        first_full=slot,
        full=len(layout.full),
        total=layout.total,
    )
    return laid_out(source, places)


def _zeros(like: View, total: int) -> tuple[mx.array, mx.array]:
    """Keys and values of a row without tokens."""
    tokens = like.full_tokens
    keys, values = (
        mx.zeros((1, x.shape[1], total, x.shape[3]), x.dtype) for x in (tokens.keys, tokens.values)
    )
    return keys, values

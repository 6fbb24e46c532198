"""Which attention answers a call of mlx-lm's function."""

from typing import Any, Callable, List, Optional, Union

import mlx.core as mx

from ..cache import BatchCompressedKVCache, CompressedKVCache, PackedRows, RowView, View
from ..kernels import FUSED
from .bridge import attend_bridge
from .function import AttentionFunctions, attention_functions
from .fused import MAX_QUERIES, attend_fused, fall_back, problem_of_rows, problem_of_view
from .packed import attend_packed
from .tiles import Mask, attend_tiles

BRIDGE = "bridge"
LEARNED_SINKS = "learned attention sinks"


def attend(
    original: Callable,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: Optional[mx.array] = None,
) -> mx.array:
    """mlx-lm's ``scaled_dot_product_attention``, for compressed caches too.

    Args:
        original: mlx-lm's own function; it serves every other cache.
        queries: (B, H_q, N, D), as the other arguments those of mlx-lm's function.
        sinks: learned attention sinks (H_q,), see :func:`attend_codes`.
    """
    ours = isinstance(cache, (CompressedKVCache, BatchCompressedKVCache))
    view = cache.view if ours else None
    if ours:
        cache.view = None
    if view is None:
        cache = None if ours else cache
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    if isinstance(view, PackedRows):
        return _attend_packed(original, queries, view, scale, sinks)
    if isinstance(view, list):
        return _attend_rows(original, queries, values, view, scale, sinks)
    return _attend_view(original, queries, view, scale, mask, sinks)


def _attend_view(
    original: Callable, queries, view: View, scale: float, mask: Mask, sinks
) -> mx.array:
    if view.coded == view.first_coded:
        # Nothing is compressed yet: this is mlx-lm's own result, bit for bit.
        keys, values = view.keys_and_values()
        return original(queries, keys, values, cache=None, scale=scale, mask=mask, sinks=sinks)
    if view.kernel == BRIDGE:
        return attend_bridge(original, queries, view, scale, mask, sinks)
    count = queries.shape[2]
    if view.kernel in FUSED and count <= MAX_QUERIES:
        # A ring makes its own mask.
        causal = view.ring is not None or isinstance(mask, str) or (mask is None and count == 1)
        if sinks is not None:
            fall_back(view.kernel, LEARNED_SINKS)
        elif not causal:
            fall_back(view.kernel, "masks other than the causal one")
        else:
            out = attend_fused(view.kernel, problem_of_view(queries, view, scale))
            if out is not None:
                return out
    return attend_tiles(queries, view, scale, mask, _functions(view), sinks)


def _attend_packed(
    original: Callable, queries, rows: PackedRows, scale: float, sinks
) -> mx.array:
    if rows.kernel == BRIDGE:
        views = [RowView(view, 0, 1) for view in rows.views()]
        return _attend_rows(original, queries, rows.values, views, scale, sinks)
    if rows.kernel in FUSED and rows.key_codes:
        if sinks is not None:
            fall_back(rows.kernel, LEARNED_SINKS)
        else:
            out = attend_fused(rows.kernel, problem_of_rows(queries, rows, scale))
            if out is not None:
                return out
    return attend_packed(original, queries, rows, scale, _functions(rows), sinks)


def _functions(view: Union[View, PackedRows]) -> AttentionFunctions:
    # What a fused kernel leaves to others is for the compiled functions.
    return attention_functions(view.codec.spec, view.kernel in ("compiled", *FUSED))


def _attend_rows(
    original: Callable, queries, values, rows: List[RowView], scale, sinks
) -> mx.array:
    """Attention of each row by itself, zero where there is padding."""
    out = []
    for index, row in enumerate(rows):
        own = queries[index : index + 1, :, row.first : row.last]
        if row.view is not None:
            own = _attend_view(original, own, row.view, scale, row.view.mask(), sinks)
        else:
            own = mx.zeros((*own.shape[:-1], values.shape[-1]), own.dtype)
        padding = [(0, 0), (0, 0), (row.first, queries.shape[2] - row.last), (0, 0)]
        out.append(own if padding[2] == (0, 0) else mx.pad(own, padding))
    return mx.concatenate(out)

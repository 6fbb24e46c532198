"""Which attention answers a call of mlx-lm's function."""

from typing import Any, Callable, List, Optional

import mlx.core as mx

from ..cache import BatchCompressedKVCache, CompressedKVCache, PackedRows, RowView, View
from .bridge import attend_bridge
from .function import attention_functions
from .packed import attend_packed
from .tiles import Mask, attend_tiles

BRIDGE = "bridge"


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
        functions = attention_functions(view.codec.spec, view.kernel == "compiled")
        return attend_packed(original, queries, view, scale, functions, sinks)
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
    functions = attention_functions(view.codec.spec, view.kernel == "compiled")
    return attend_tiles(queries, view, scale, mask, functions, sinks)


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

"""Which attention answers a call of mlx-lm's function."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..backends import support
from ..cache import BatchCompressedKVCache, BatchedRows, BatchView, CompressedKVCache, RowView, View
from ..cache.causal import Mask
from ..cache.observed import ObservedKVCache
from ..cache.parts import parts
from ..cache.passes import StepPlan
from ..cache.visibility import ROLLBACK
from .batched_rows import attend_batched
from .dequantized import attend_batched_dequantized, attend_dequantized, attend_rows_dequantized
from .function import AttentionFunctions, attention_functions
from .fused import attend_fused, fall_back
from .masks import checked
from .tiles import attend_tiles

OTHER_MASKS = "masks other than the causal one"


def attend(
    original: Callable,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's ``scaled_dot_product_attention``, for compressed caches too.

    Args:
        original: mlx-lm's own function; it serves every other cache.
        queries: (B, H_q, N, D), as the other arguments those of mlx-lm's function.
        sinks: learned attention sinks (H_q,), scores of one more token without a value.

    Raises:
        ValueError: see :func:`attention.masks.check`.
    """
    ours = isinstance(cache, (CompressedKVCache, BatchCompressedKVCache))
    view = cache.take(keys, values) if ours else None
    if view is None:
        # The keys' is the first in a list.
        observed = next(parts(cache), None)
        if isinstance(observed, ObservedKVCache):
            observed.observe(queries)
        cache = None if ours else cache
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    if isinstance(view, BatchView):
        out = _attend_batch(original, queries, values, view, scale, mask, sinks)
        rotates, count = view.ring is not None, queries.shape[2]
    else:
        view, mask = _masked(view, mask, queries)
        out = _attend_view(original, queries, view, scale, mask, sinks)
        rotates, count = view.plan.ring is not None, view.plan.queries
    if rotates or count > ROLLBACK:
        # Some of what the cache holds now no query reads, and later another thread may want it.
        out = mx.depends(out, cache.arrays)
    return out


def _masked(view: View, mask: Mask, queries: mx.array) -> tuple[View, Mask]:
    """What ``queries`` see by a mask of their model's: a view, and a mask of its tokens."""
    if mask is None and view.plan.ring is None:
        # A step of decoding, most often.
        return view, None
    if view.plan.knows(mask):
        return view, "causal" if queries.shape[2] > 1 else None
    return view.whole, checked(mask, queries, view.plan.columns)


def _attend_view(
    original: Callable, queries: mx.array, view: View, scale: float, mask: Mask, sinks
) -> mx.array:
    plan = view.plan
    count = plan.queries
    if plan.quantized == plan.first_quantized:
        # Nothing is compressed: this is mlx-lm's own result, bit for bit.
        keys, values = view.laid_out or view.keys_and_values()
        if plan.ring is not None and plan.forgets:
            mask = plan.ring.mask(plan.start, count, return_array=True)
        return original(queries, keys, values, cache=None, scale=scale, mask=mask, sinks=sinks)
    if count <= view.backend.max_queries:
        if isinstance(mask, str) or (mask is None and count == 1):
            out = attend_fused(queries, view, scale, sinks)
            if out is not None:
                return out
        else:
            fall_back(view.backend, OTHER_MASKS)
    if support.on_gpu() or view.backend.dequantizes:
        return attend_dequantized(original, queries, view, scale, mask, sinks)
    return attend_tiles(queries, view, scale, mask, _functions(view), sinks)


def _attend_batch(
    original: Callable, queries, values, view: BatchView, scale: float, mask: Mask, sinks
) -> mx.array:
    count, rows = queries.shape[2], view.rows
    if isinstance(mask, mx.array) and view.knows(mask):
        mask = "causal"
    elif not isinstance(rows, BatchedRows):
        rows = [row.whole for row in rows]
    mask = checked(mask, queries, view.index + count)
    if isinstance(rows, BatchedRows):
        return _attend_batched(original, queries, rows, scale, mask, view.left_padding, sinks)
    filled = [row.view for row in rows if row.view is not None]
    backend = filled[0].backend if filled else None
    if backend and count > backend.max_queries and (support.on_gpu() or backend.dequantizes):
        return attend_rows_dequantized(
            original, queries, rows, scale, mask, view.left_padding, sinks
        )
    out = []
    for index, row in enumerate(rows):
        own = queries[index : index + 1, :, row.first : row.last]
        if row.view is None:
            own = mx.zeros((*own.shape[:-1], values.shape[-1]), own.dtype)
        else:
            own_mask = _row_mask(mask, index, row, row.view.plan, view.left_padding[index])
            own = _attend_view(original, own, row.view, scale, own_mask, sinks)
        padding = [(0, 0), (0, 0), (row.first, count - row.last), (0, 0)]
        out.append(own if padding[2] == (0, 0) else mx.pad(own, padding))
    return mx.concatenate(out)


def _row_mask(mask: Mask, index: int, row: RowView, plan: StepPlan, padding: int) -> Mask:
    """A batch's mask for one row: its own queries, and the tokens that the first of them sees."""
    if not isinstance(mask, mx.array):
        return mask if row.last - row.first > 1 else None
    mask = mask[index : index + 1] if mask.shape[0] > 1 else mask
    mask = mask[:, :, row.first : row.last, padding:]
    oldest = max(plan.sinks, plan.oldest(0)[1])
    return mx.concatenate([mask[..., : plan.sinks], mask[..., oldest : plan.end]], axis=-1)


def _attend_batched(
    original: Callable,
    queries: mx.array,
    rows: BatchedRows,
    scale: float,
    mask: Mask,
    left_padding: Sequence[int],
    sinks,
) -> mx.array:
    if rows.backend.max_queries and rows.key_codes:
        if isinstance(mask, mx.array):
            fall_back(rows.backend, OTHER_MASKS)
        else:
            out = attend_fused(queries, rows, scale, sinks)
            if out is not None:
                return out
    if support.on_gpu() or rows.backend.dequantizes:
        return attend_batched_dequantized(original, queries, rows, scale, mask, left_padding, sinks)
    given = mask if isinstance(mask, mx.array) else None
    return attend_batched(queries, rows, scale, _functions(rows), given, left_padding, sinks)


def _functions(view: View | BatchedRows) -> AttentionFunctions:
    return attention_functions(view.codec.spec, view.backend.compiled)

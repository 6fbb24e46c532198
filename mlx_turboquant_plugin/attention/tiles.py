"""Attention of any number of queries over a view: tiles of queries, pieces of codes.

No array of all the scores and no dequantized copy of all the keys is ever made, and
every query sees what the rule of visibility says, however the prompt was cut into chunks.
"""

import mlx.core as mx

from ..cache.causal import Mask
from ..cache.view import View
from ..cache.visibility import BLOCK
from .function import AttentionFunctions
from .masks import both
from .pieces import PIECE, FullPrecision, Quantized, attend_codes, from_oldest

# Bytes of a tile's scores with a piece of codes: they should stay in the processor's cache, and
# MLX holds the results of some ten operations that it has not come to.
TILE_BYTES = 2**19


def attend_tiles(
    queries: mx.array,
    view: View,
    scale: float,
    mask: Mask,
    functions: AttentionFunctions,
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attention of ``queries`` (B, H_q, N, D) over ``view``; returns (B, H_q, N, D_v).

    Args:
        mask: None, "causal", or an array (B or 1, H_q or 1, N, T), bool or additive, over
            the tokens that the first query sees.
        learned_sinks: (H_q,), see :func:`attend_codes`.
    """
    batch, heads, count, _ = queries.shape
    per_query = 4 * batch * heads * min(view.plan.end, PIECE)
    rows = max(BLOCK, TILE_BYTES // per_query)
    tiles: list[mx.array] = []
    for i in range(0, count, rows):
        tile = queries[:, :, i : i + rows]
        if tiles:
            # One after the other, or all of them would be in memory at once.
            tile = mx.depends(tile, tiles[-1])
        tiles.append(_tile(tile, view, i, scale, _rows(mask, i, rows), functions, learned_sinks))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def _rows(mask: Mask, start: int, count: int) -> Mask:
    return mask[..., start : start + count, :] if isinstance(mask, mx.array) else mask


def _tile(
    queries, view: View, index: int, scale: float, mask: Mask, functions, learned_sinks
) -> mx.array:
    count, kv_heads = queries.shape[2], view.full_tokens.keys.shape[1]
    first = view.plan.start + index
    last = first + count - 1
    _, oldest = view.plan.oldest(index)
    full_from = max(oldest, view.plan.full_from(first))
    quantized_to = max(oldest, view.plan.full_from(last))
    seen_to = last + 1 if isinstance(mask, str) or count == 1 else view.plan.end
    keys, values = view.full(full_from, seen_to)
    forgets = view.plan.oldest(index + count - 1)[0] > 0
    if quantized_to == view.plan.sinks and not forgets:
        part = mask[..., :seen_to] if isinstance(mask, mx.array) else mask
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=part, sinks=learned_sinks
        )
    # Whole blocks make matrices of a shape that is fast.
    whole = max(view.plan.first_quantized, oldest // BLOCK * BLOCK)
    codes = range(whole if quantized_to > oldest else quantized_to, quantized_to)
    full_mask, code_mask = (
        _per_row(m, queries.shape[1] // kv_heads, kv_heads)
        for m in _masks(view, index, count, forgets, full_from, codes, seen_to, mask)
    )
    full = FullPrecision(keys, values, full_mask)
    quantized = Quantized(view.codec, view.codes, codes, oldest, code_mask)
    return attend_codes(queries, full, quantized, scale, functions, learned_sinks)


def _masks(
    view: View, index: int, count: int, forgets: bool, full_from, codes: range, seen_to, mask: Mask
):
    """Masks of the full-precision tokens and of the codes, or None where all are seen."""
    full_mask = code_mask = None
    sinks = view.plan.sinks
    if count > 1 or forgets:
        full = mx.concatenate([mx.arange(sinks), mx.arange(full_from, seen_to)])
        queries = mx.arange(index, index + count)[:, None]
        hidden, oldest = view.plan.oldest(queries)
        positions = view.plan.start + queries
        # view.plan.full_from(), for every query at once.
        begins = full_from
        if not view.plan.is_prompt:
            begins = positions // BLOCK * BLOCK - view.plan.visibility.window
            begins = mx.maximum(begins, view.plan.full_start)
        begins = mx.maximum(begins, oldest)
        full_mask = mx.where(full < sinks, full >= hidden, full >= begins)
        if isinstance(mask, str):
            full_mask = full_mask & (full <= positions)
        if forgets or codes.stop > full_from:
            quantized = mx.arange(codes.start, codes.stop)
            code_mask = (quantized >= oldest) & (quantized < begins)
    if isinstance(mask, mx.array):
        # What the first query of the pass does not see has no column.
        skipped = max(sinks, view.plan.oldest(0)[1]) - sinks
        full_given, code_given = (
            mx.take(mask, mx.array(columns, mx.int32), axis=-1)
            for columns in (
                [*range(sinks), *range(full_from - skipped, seen_to - skipped)],
                [max(0, position - skipped) for position in codes],
            )
        )
        if code_mask is None:
            code_mask = from_oldest(sinks + skipped, codes.start, codes.stop)
        full_mask, code_mask = both(full_mask, full_given), both(code_mask, code_given)
    return full_mask, code_mask


def _per_row(mask: mx.array | None, groups: int, kv_heads: int) -> mx.array | None:
    """A mask (..., N, T), or (T,), for rows that are pairs of a query head and a position."""
    if mask is None or mask.ndim == 1 or groups == 1:
        return mask
    if mask.ndim == 4 and mask.shape[1] != 1:
        batch, _, count, length = mask.shape
        return mask.reshape(batch, kv_heads, groups * count, length)
    return mx.concatenate([mask] * groups, axis=-2)

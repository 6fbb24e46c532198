"""Attention of any number of queries over a view: tiles of queries, pieces of codes.

No array of all the scores and no dequantised copy of all the keys is ever made, and
every query sees what the rule of visibility says, however the prompt was cut into chunks.
"""

import functools
from typing import Optional, Union

import mlx.core as mx

from ..cache.view import View
from ..cache.visibility import BLOCK
from ..codecs.byte_matrix import prepare
from .function import MASKED, AttentionFunctions

Mask = Optional[Union[str, mx.array]]

# Coded tokens that are dequantised at once, and bytes of a tile's scores with them.
# On the CPU they should stay in the processor's cache; elsewhere few launches matter more.
PIECE = {mx.cpu: 1024, mx.gpu: 65536}
TILE_BYTES = {mx.cpu: 2**20, mx.gpu: 64 * 2**20}
# A single query has so few scores that larger pieces fit as well, in fewer operations.
SINGLE_QUERY = 4


def attend_tiles(
    queries: mx.array, view: View, scale: float, mask: Mask, functions: AttentionFunctions
) -> mx.array:
    """Attention of ``queries`` (B, H_q, N, D) over ``view``; returns (B, H_q, N, D_v).

    Args:
        mask: None, "causal", or an array (..., N, T), bool or additive.
    """
    batch, heads, count, _ = queries.shape
    per_query = 4 * batch * heads * min(view.end, _piece(count))
    rows = max(BLOCK, TILE_BYTES[mx.default_device().type] // per_query)
    tiles = []
    for i in range(0, count, rows):
        tile = queries[:, :, i : i + rows]
        if tiles:
            # One after the other, or all of them would be in memory at once.
            tile = mx.depends(tile, tiles[-1])
        tiles.append(_tile(tile, view, view.start + i, scale, _rows(mask, i, rows), functions))
    return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)


def _piece(queries: int) -> int:
    return PIECE[mx.default_device().type] * (SINGLE_QUERY if queries == 1 else 1)


def _rows(mask: Mask, start: int, count: int) -> Mask:
    return mask[..., start : start + count, :] if isinstance(mask, mx.array) else mask


def _tile(queries, view: View, first: int, scale: float, mask: Mask, functions) -> mx.array:
    batch, heads, count, dim = queries.shape
    kv_heads = view.keys.shape[1]
    sinks, codec = view.visibility.sinks, view.codec
    last = first + count - 1
    exact_from = view.visibility.exact_from(first)
    coded_to = view.visibility.exact_from(last)
    seen_to = last + 1 if isinstance(mask, str) or count == 1 else view.end
    keys, values = view.exact(exact_from, seen_to)
    if coded_to == sinks:
        part = mask[..., :seen_to] if isinstance(mask, mx.array) else mask
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=part)
    exact_mask, code_mask = (
        _per_row(m, heads // kv_heads, kv_heads)
        for m in _masks(view, first, count, exact_from, coded_to, seen_to, mask)
    )
    # All queries that share a KV head are rows of one matrix product.
    q = queries.astype(mx.float32).reshape(batch, kv_heads, -1, dim) * scale
    rotated, sums = functions.begin(
        q, keys, values, codec.key_rotation.array, codec.balance, exact_mask
    )
    piece = _piece(count)
    for start in range(0, coded_to, piece):
        stop = min(start + piece, coded_to)
        part = None if code_mask is None else code_mask[..., start:stop]
        if part is None and start < sinks:
            part = _after_sinks(start, stop, sinks)
        bias = None if codec.bias is None else codec.bias.scores(q, start, stop - start)
        coded_keys, coded_values = functions.expand(*view.codes(start, stop))
        coded_keys = _prepared(codec.keys, coded_keys, -2)
        coded_values = _prepared(codec.values, coded_values, -1)
        sums = functions.fold(rotated, sums, coded_keys, coded_values, bias, part)
    out = functions.finish(sums, codec.value_rotation.array)
    return out.reshape(batch, heads, count, -1).astype(queries.dtype)


def _prepared(quantizer, expanded, axis: int):
    first, *rest = expanded
    if not isinstance(first, tuple):
        return expanded
    return (prepare(first, axis, quantizer.offset), *rest)


@functools.lru_cache(maxsize=4)
def _after_sinks(start: int, stop: int, sinks: int) -> mx.array:
    mask = mx.arange(start, stop) >= sinks
    mx.eval(mask)
    return mask


def _masks(view: View, first, count, exact_from, coded_to, seen_to, mask: Mask):
    """Masks of the exact tokens and of the codes, or None where all are seen."""
    exact_mask = code_mask = None
    if count > 1:
        sinks = view.sinks
        exact = mx.concatenate([mx.arange(sinks), mx.arange(exact_from, seen_to)])
        positions = mx.arange(first, first + count)[:, None]
        # exact_from(), for every query at once.
        begins = mx.maximum(positions // BLOCK * BLOCK - view.visibility.window, sinks)
        exact_mask = (exact < sinks) | (exact >= begins)
        if isinstance(mask, str):
            exact_mask = exact_mask & (exact <= positions)
        if coded_to > exact_from or isinstance(mask, mx.array):
            coded = mx.arange(coded_to)
            code_mask = (coded >= sinks) & (coded < begins)
    if isinstance(mask, mx.array):
        exact_given = mx.concatenate(
            [mask[..., : view.sinks], mask[..., exact_from:seen_to]], axis=-1
        )
        code_given = mask[..., :coded_to]
        if code_mask is None:
            code_mask = _after_sinks(0, coded_to, view.sinks)
        exact_mask, code_mask = _both(exact_mask, exact_given), _both(code_mask, code_given)
    return exact_mask, code_mask


def _both(ours: Optional[mx.array], given: mx.array) -> mx.array:
    if ours is None:
        return given
    if given.dtype == mx.bool_:
        return ours & given
    return mx.where(ours, given.astype(mx.float32), MASKED)


def _per_row(mask: Optional[mx.array], groups: int, kv_heads: int) -> Optional[mx.array]:
    """A mask (..., N, T) for rows that are pairs of a query head and a position."""
    if mask is None or groups == 1:
        return mask
    if mask.ndim == 4 and mask.shape[1] != 1:
        batch, _, count, length = mask.shape
        return mask.reshape(batch, kv_heads, groups * count, length)
    return mx.concatenate([mask] * groups, axis=-2)

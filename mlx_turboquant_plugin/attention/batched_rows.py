"""Attention of the newest token of every row of a batch, all rows at once."""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..cache.batched_rows import BatchedRows
from ..cache.laying_out import code_range
from ..cache.visibility import Visibility
from .function import AttentionFunctions
from .masks import both
from .pieces import FullPrecision, Quantized, attend_codes


def attend_batched(
    queries: mx.array,
    rows: BatchedRows,
    scale: float,
    functions: AttentionFunctions,
    mask: mx.array | None,
    left_padding: Sequence[int],
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attention of ``queries`` (B, H_q, 1, D); returns (B, H_q, 1, D_v).

    Args:
        mask: None, or (B or 1, H_q or 1, 1, T) for mlx-lm's BatchKVCache, whose rows have
            ``left_padding``.
        learned_sinks: (H_q,), see :func:`attend_codes`.
    """
    sinks, held = rows.visibility.sinks, rows.full_tokens.count
    full_mask, codes_end, code_mask = _masks(rows.lengths, rows.full_start, held, rows.visibility)
    if mask is not None:
        padding = mx.array(list(left_padding))[:, None]
        newest = mx.array(rows.lengths)[:, None] + mx.arange(sinks - held, 0)
        places = mx.concatenate([mx.zeros_like(padding) + mx.arange(sinks), newest], axis=1)
        full_mask, code_mask = (
            _per_head(both(own, _columns(mask, positions + padding)), queries, rows)
            for own, positions in ((full_mask, places), (code_mask, mx.arange(codes_end)[None]))
        )
    full = FullPrecision(rows.keys, rows.values, full_mask)

    def codes(first, last):
        if (first, last) == (0, max(rows.quantized)):
            return rows.key_codes, rows.value_codes
        return code_range(rows.key_codes, rows.value_codes, first, last)

    positions = range(codes_end if codes_end > sinks else 0)
    quantized = Quantized(rows.codec, codes, positions, sinks, code_mask)
    return attend_codes(queries, full, quantized, scale, functions, learned_sinks)


def _columns(mask: mx.array, columns: mx.array) -> mx.array:
    """What a mask (B or 1, H_q or 1, 1, T) says of ``columns`` (B, n): (B, H_q or 1, 1, n)."""
    columns = mx.clip(columns, 0, mask.shape[-1] - 1)
    return mx.take_along_axis(mask, columns[:, None, None], axis=-1)


def _per_head(mask: mx.array, queries: mx.array, rows: BatchedRows) -> mx.array:
    """A mask (B, H_q or 1, 1, n) for rows that are the query heads of a KV head."""
    if mask.shape[1] == 1:
        return mask
    return mask.reshape(mask.shape[0], rows.keys.shape[1], -1, mask.shape[-1])


# All layers ask for the same.
@functools.lru_cache(maxsize=4)
def _masks(
    lengths: Sequence[int], full_start: Sequence[int], full: int, visibility: Visibility
) -> tuple[mx.array, int, mx.array]:
    """What the newest token of each row sees.

    Args:
        lengths, full_start: of each row.
        full: the number of full-precision tokens that each row has room for, sinks included.

    Returns:
        The mask of the full-precision tokens (B, 1, 1, E), the number of positions that some
        row reads as codes, and the mask of these (B, 1, 1, positions).
    """
    sinks = visibility.sinks
    end = np.array(lengths)[:, None]
    begins = np.array([visibility.full_from(length - 1) for length in lengths])[:, None]
    begins = np.maximum(begins, np.array(full_start)[:, None])
    positions = end - (full - sinks) + np.arange(full - sinks)
    seen = np.concatenate([np.ones((len(lengths), sinks), bool), positions >= begins], axis=1)
    codes_end = int(begins.max())
    quantized = np.arange(codes_end)
    seen_codes = (quantized >= sinks) & (quantized < begins)
    return mx.array(seen[:, None, None]), codes_end, mx.array(seen_codes[:, None, None])

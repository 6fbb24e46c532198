"""Attention of the newest token of every row of a batch, all rows at once."""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..cache.laying_out import code_range
from ..cache.packed import PackedRows
from ..cache.visibility import Visibility
from .function import AttentionFunctions
from .masks import both
from .pieces import Coded, Exact, attend_codes


def attend_packed(
    queries: mx.array,
    rows: PackedRows,
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
    sinks, held = rows.visibility.sinks, rows.exact_tokens.count
    exact_mask, codes_end, code_mask = _masks(rows.lengths, rows.exact_start, held, rows.visibility)
    if mask is not None:
        padding = mx.array(list(left_padding))[:, None]
        newest = mx.array(rows.lengths)[:, None] + mx.arange(sinks - held, 0)
        places = mx.concatenate([mx.zeros_like(padding) + mx.arange(sinks), newest], axis=1)
        exact_mask, code_mask = (
            _per_head(both(own, _columns(mask, positions + padding)), queries, rows)
            for own, positions in ((exact_mask, places), (code_mask, mx.arange(codes_end)[None]))
        )
    exact = Exact(rows.keys, rows.values, exact_mask)

    def codes(first, last):
        if (first, last) == (0, max(rows.coded)):
            return rows.key_codes, rows.value_codes
        return code_range(rows.key_codes, rows.value_codes, first, last)

    positions = range(codes_end if codes_end > sinks else 0)
    coded = Coded(rows.codec, codes, positions, sinks, code_mask)
    return attend_codes(queries, exact, coded, scale, functions, learned_sinks)


def _columns(mask: mx.array, columns: mx.array) -> mx.array:
    """What a mask (B or 1, H_q or 1, 1, T) says of ``columns`` (B, n): (B, H_q or 1, 1, n)."""
    columns = mx.clip(columns, 0, mask.shape[-1] - 1)
    return mx.take_along_axis(mask, columns[:, None, None], axis=-1)


def _per_head(mask: mx.array, queries: mx.array, rows: PackedRows) -> mx.array:
    """A mask (B, H_q or 1, 1, n) for rows that are the query heads of a KV head."""
    if mask.shape[1] == 1:
        return mask
    return mask.reshape(mask.shape[0], rows.keys.shape[1], -1, mask.shape[-1])


# All layers ask for the same.
@functools.lru_cache(maxsize=4)
def _masks(
    lengths: Sequence[int], exact_start: Sequence[int], exact: int, visibility: Visibility
) -> tuple[mx.array, int, mx.array]:
    """What the newest token of each row sees.

    Args:
        lengths, exact_start: of each row.
        exact: the number of exact tokens that are packed, sinks included.

    Returns:
        The mask of the exact tokens (B, 1, 1, E), the number of positions that some
        row reads as codes, and the mask of these (B, 1, 1, positions).
    """
    sinks = visibility.sinks
    end = np.array(lengths)[:, None]
    begins = np.array([visibility.exact_from(length - 1) for length in lengths])[:, None]
    begins = np.maximum(begins, np.array(exact_start)[:, None])
    positions = end - (exact - sinks) + np.arange(exact - sinks)
    seen = np.concatenate([np.ones((len(lengths), sinks), bool), positions >= begins], axis=1)
    codes_end = int(begins.max())
    coded = np.arange(codes_end)
    seen_codes = (coded >= sinks) & (coded < begins)
    return mx.array(seen[:, None, None]), codes_end, mx.array(seen_codes[:, None, None])

"""Attention of the newest token of every row of a batch, all rows at once."""

import functools
from typing import Callable, Optional, Sequence, Tuple

import mlx.core as mx
import numpy as np

from ..cache.packed import PackedRows
from ..cache.view import code_range
from ..cache.visibility import Visibility
from .function import AttentionFunctions
from .pieces import Coded, Exact, attend_codes


def attend_packed(
    original: Callable,
    queries: mx.array,
    rows: PackedRows,
    scale: float,
    functions: AttentionFunctions,
    learned_sinks: Optional[mx.array] = None,
) -> mx.array:
    """Attention of ``queries`` (B, H_q, 1, D); returns (B, H_q, 1, D_v).

    Args:
        original: mlx-lm's own function, for rows that are all so short that nothing
            is compressed.
        learned_sinks: (H_q,), see :func:`attend_codes`.
    """
    sinks = rows.visibility.sinks
    exact_mask, codes_end, code_mask = _masks(
        rows.lengths, rows.exact_start, rows.keys.shape[2], rows.visibility
    )
    if codes_end <= sinks:
        return original(
            queries,
            rows.keys,
            rows.values,
            cache=None,
            scale=scale,
            mask=exact_mask,
            sinks=learned_sinks,
        )
    exact = Exact(rows.keys, rows.values, exact_mask)

    def codes(first, last):
        if (first, last) == (0, max(rows.coded)):
            return rows.key_codes, rows.value_codes
        return code_range(rows.key_codes, rows.value_codes, first, last)

    coded = Coded(rows.codec, codes, range(codes_end), sinks, code_mask)
    return attend_codes(queries, exact, coded, scale, functions, learned_sinks)


# All layers ask for the same.
@functools.lru_cache(maxsize=4)
def _masks(
    lengths: Sequence[int], exact_start: Sequence[int], exact: int, visibility: Visibility
) -> Tuple[mx.array, int, mx.array]:
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

"""What the attention of one forward pass reads from a batch, and the mask that fits it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask

from ..per_thread import cached_per_thread
from .batched_rows import BatchedRows
from .view import View
from .visibility import Ring


@dataclass(frozen=True)
class RowView:
    """What the queries of one sequence see: those from ``first`` to before ``last``."""

    view: View | None
    first: int
    last: int

    @property
    def apart(self) -> "RowView":
        """See :attr:`View.apart`."""
        return self if self.view is None else replace(self, view=self.view.apart)

    @property
    def whole(self) -> "RowView":
        """See :attr:`View.whole`."""
        return self if self.view is None else replace(self, view=self.view.whole)


@dataclass(frozen=True)
class BatchView:
    """What the queries of a batch see.

    Attributes:
        rows: all rows batched, or each by itself.
        index: the tokens before the pass, padding included, as BatchKVCache counts them.
        new: keys and values of the pass, (B, H, N, D), padding included.
        left_padding: of each row.
        ring: how far back rings see, or None.
    """

    rows: BatchedRows | list[RowView]
    index: int
    new: tuple[mx.array, mx.array]
    left_padding: tuple[int, ...]
    ring: Ring | None

    def knows(self, mask: mx.array) -> bool:
        """Whether ``mask`` is what the batch itself made for this pass."""
        made = batch_mask(self.queries, self.index, self.left_padding, ring=self.ring)
        return mask is made

    @property
    def queries(self) -> int:
        """The number of queries, padding included."""
        return self.new[0].shape[2]

    @property
    def apart(self) -> "BatchView":
        """See :attr:`View.apart`."""
        if isinstance(self.rows, BatchedRows):
            return replace(self, rows=self.rows.apart)
        return replace(self, rows=[row.apart for row in self.rows])

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that the queries see, (B, H, T, D) in the model's dtype, codes dequantized.

        Tokens stand where the batch's mask has them, among zeros.
        """
        if isinstance(self.rows, BatchedRows):
            views = self.rows.views()
        else:
            views = [row.view for row in self.rows]
        return side_by_side(views, self.left_padding, self.index + self.queries, self.new)


def side_by_side(
    views: Sequence[View | None],
    left_padding: Sequence[int],
    columns: int,
    like: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    """Keys and values of rows, each behind its padding, (B, H, ``columns``, D).

    Args:
        like: some keys and values, for rows that have none.
    """
    rows = []
    for view, padding in zip(views, left_padding):
        if view is None:
            rows.append([mx.zeros((1, x.shape[1], columns, x.shape[3]), x.dtype) for x in like])
            continue
        # What a ring has forgotten leaves a gap.
        sinks, gap = view.plan.sinks, min(view.plan.oldest(0)[1], view.plan.end) - view.plan.sinks
        parts = [
            [x[:, :, :sinks], mx.zeros((*x.shape[:2], gap, x.shape[3]), x.dtype), x[:, :, sinks:]]
            for x in view.keys_and_values()
        ]
        around = [(0, 0), (0, 0), (padding, columns - padding - view.plan.end), (0, 0)]
        rows.append([mx.pad(mx.concatenate(x, axis=2), around) for x in parts])
    keys, values = (mx.concatenate(list(side)) for side in zip(*rows))
    return keys, values


# All layers get the same, which tells it from the masks of others. By thread, since lazy
# arrays must not be shared by threads.
@cached_per_thread(maxsize=2)
def batch_mask(
    count: int,
    index: int,
    left_padding: tuple[int, ...],
    window: int | None = None,
    ring: Ring | None = None,
) -> mx.array:
    """Which tokens ``count`` queries of a batch see: bool (B, 1, N, T).

    Args:
        index: the tokens before them, padding included.
        window: how far back they see, or None for all the way.
        ring: what says so instead, or None.
    """
    if ring is not None and ring.keep:
        rows = [_ring_mask(count, index, padding, ring) for padding in left_padding]
        return mx.stack(rows)[:, None]
    window = window if ring is None else ring.max_size
    padding = mx.array(np.array(left_padding, np.int32))
    return create_causal_mask(count, offset=index, window_size=window, left_padding=padding)


def _ring_mask(count: int, index: int, padding: int, ring: Ring) -> mx.array:
    """The same for one ring that keeps its first tokens: bool (N, T)."""
    positions = mx.arange(-padding, index + count - padding)
    queries = mx.arange(index - padding, index + count - padding)[:, None]
    start = max(0, index - padding)
    oldest_kept, oldest = ring.oldest(start, mx.maximum(queries - start, 0))
    kept = (positions >= oldest_kept) & (positions < ring.keep)
    return (positions <= queries) & (kept | (positions >= oldest))

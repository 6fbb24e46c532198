"""Where tokens stand in the arrays that MLX's own attention is given, and who sees them."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.causal import Mask
from ..cache.view import View
from ..cache.visibility import BLOCK, Ring, Visibility
from ..per_thread import cached_per_thread
from .masks import lowest


class Layout(NamedTuple):
    """The tokens of one sequence side by side: zeros, sinks, codes, full-precision tokens, zeros.

    Attributes:
        sinks: the number of sinks.
        decoded: the positions that some query reads through their codes.
        full: the positions that some query reads exactly. Positions can be in both.
        left: the zeros before.
        total: T, all places.
    """

    sinks: int = 0
    decoded: range = range(0)
    full: range = range(0)
    left: int = 0
    total: int = 0

    @property
    def tokens(self) -> int:
        """How many places are not filled with zeros."""
        return self.sinks + len(self.decoded) + len(self.full)

    @property
    def repeats(self) -> bool:
        """Whether some positions are there twice: some queries read them exactly, others not."""
        return bool(self.decoded) and self.decoded.stop > self.full.start

    def positions(self) -> np.ndarray:
        """The position at each place, int32 (T,), and -1 where there is none."""
        out = np.full(self.total, -1, np.int32)
        full: np.ndarray = np.array(self.full, np.int32)
        # A batch may have places of full-precision tokens that a short row has no token for.
        full = np.where(full < self.sinks, -1, full)
        tokens: list[np.ndarray] = [
            np.arange(self.sinks),
            np.array(self.decoded, np.int32),
            full,
        ]
        out[self.left :][: self.tokens] = np.concatenate(tokens)
        return out

    def codes(self) -> np.ndarray:
        """Where a code stands, bool (T,)."""
        out = np.zeros(self.total, bool)
        out[self.left + self.sinks :][: len(self.decoded)] = True
        return out


def layout_of(view: View) -> Layout:
    """What the queries of ``view`` see, without any zeros."""
    sinks = view.plan.sinks
    oldest = max(sinks, view.plan.oldest(0)[1])
    full_from = min(view.plan.end, max(oldest, view.plan.full_from(view.plan.start)))
    decoded_to = min(view.plan.end, max(oldest, view.plan.full_from(view.plan.end - 1)))
    decoded, full = range(oldest, decoded_to), range(full_from, view.plan.end)
    return Layout(sinks, decoded, full, 0, sinks + len(decoded) + len(full))


class Row(NamedTuple):
    """What decides who sees what in one sequence; equal for all layers.

    Attributes:
        layout: of its tokens.
        start: the position of its first query.
        first: the number of that query in the pass; those before are padding.
        full_start: the first position after the sinks that is there in full precision.
        is_prompt, visibility, ring: as in :class:`View`.
    """

    layout: Layout
    start: int
    first: int
    full_start: int
    is_prompt: bool
    visibility: Visibility
    ring: Ring | None = None

    @classmethod
    def of(cls, view: View, layout: Layout, first: int = 0) -> "Row":
        """The row of a view, whose first query is number ``first`` of the pass."""
        return cls(
            layout,
            view.plan.start,
            first,
            view.plan.full_start,
            view.plan.is_prompt,
            view.plan.visibility,
            view.plan.ring,
        )

    def limits(self, count: int) -> tuple[np.ndarray, ...]:
        """For each query, int32 (N,): its position, the first that it reads in full precision,
        the oldest sink and the oldest later token that it sees."""
        queries = np.arange(count) - self.first
        positions = self.start + queries
        own = np.full_like(positions, self.start) if self.is_prompt else positions
        begins = np.maximum(own // BLOCK * BLOCK - self.visibility.window, self.full_start)
        hidden, oldest = np.zeros_like(begins), np.full_like(begins, self.layout.sinks)
        if self.ring is not None:
            hidden, oldest = np.array([self.ring.oldest(self.start, int(i)) for i in queries]).T
        limits = positions, np.maximum(begins, oldest), hidden, oldest
        return tuple(x.astype(np.int32) for x in limits)

    def columns(self, padding: int | None) -> np.ndarray:
        """For each place, int32 (T,), the column of a mask for mlx-lm's own cache.

        Args:
            padding: the columns of a batch before this row's, or None by itself: then there
                are no columns for what its first query does not see.
        """
        positions = self.layout.positions()
        if padding is None:
            skipped = self.layout.decoded.start - self.layout.sinks
            positions = np.where(positions < self.layout.sinks, positions, positions - skipped)
        return np.maximum(positions + (padding or 0), 0)


def combined_mask(
    rows: Sequence[Row],
    count: int,
    mask: Mask,
    left_padding: Sequence[int | None],
    dtype: mx.Dtype,
) -> mx.array:
    """What each row's queries see, and a given mask lets them see, as an additive mask.

    MLX's fused attention is several times slower with bool masks.

    Args:
        mask: "causal", None, or an array (B or 1, H_q or 1, N, T) for mlx-lm's own cache, bool
            or in ``dtype``.
        left_padding: see :meth:`Row.columns`; of each row.

    Returns:
        (B, H_q or 1, N, T) in ``dtype``; B is 1 for a single row.
    """
    ours = _visible(tuple(rows), count, isinstance(mask, str), dtype)
    if not isinstance(mask, mx.array):
        return ours
    columns = np.stack([row.columns(padding) for row, padding in zip(rows, left_padding)])
    given = mx.take_along_axis(mask, mx.array(columns)[:, None, None], axis=-1)
    if given.dtype == mx.bool_:
        return mx.where(given, ours, mx.array(lowest(dtype), dtype))
    return mx.where(ours == 0, given, ours)


def forget_masks() -> None:
    """Free what a prompt's masks take, once there are steps that need none."""
    _visible.cache_clear()


# All layers ask for the same. By thread, since lazy arrays must not be shared by threads.
@cached_per_thread(maxsize=2)
def _visible(rows: tuple[Row, ...], count: int, causal: bool, dtype: mx.Dtype) -> mx.array:
    """Zero where a query sees a token and reads it as it stands there, else very low."""
    places, is_code = (
        mx.array(np.stack(x)[:, None, None])
        for x in zip(*((row.layout.positions(), row.layout.codes()) for row in rows))
    )
    positions, begins, hidden, oldest = (
        mx.array(np.stack(x)[:, None, :, None]) for x in zip(*(row.limits(count) for row in rows))
    )
    is_sink = places < mx.array([[[[row.layout.sinks]]] for row in rows])
    seen = mx.where(is_code, places < begins, is_sink | (places >= begins))
    seen = seen & (places >= mx.where(is_sink, hidden, oldest)) & (places >= 0)
    if causal:
        seen = seen & (places <= positions)
    return mx.where(seen, mx.array(0, dtype), mx.array(lowest(dtype), dtype))

"""Tokens for the rows of a batch that each stand by themselves, as in prompts."""

from collections.abc import Sequence

import mlx.core as mx

from .batch_view import RowView
from .compressed import CompressedKVCache

# The first token, and one more than the last.
Part = tuple[int, int]


def own_tokens(
    count: int, index: int, left_padding: Sequence[int], lengths: Sequence[int] | None
) -> list[Part]:
    """Which of the next ``count`` tokens belong to each row: padding is left and right.

    Args:
        index: the tokens before them, padding included.
        lengths: of the rows once padding on the right begins, or None if none is expected.
    """
    parts = []
    for row, padding in enumerate(left_padding):
        position = index - padding
        last = count
        if lengths is not None:
            last = min(count, lengths[row] - position)
        first = min(count, max(0, -position))
        parts.append((first, max(first, last)))
    return parts


def append_rows(
    rows: Sequence[CompressedKVCache], keys: mx.array, values: mx.array, parts: Sequence[Part]
) -> list[RowView]:
    """Append to each row its part of keys and values (B, H, N, D); returns what queries see.

    Raises:
        ValueError: see :meth:`CompressedKVCache.append`; rows before that one have changed.
    """
    views = []
    for index, (row, (first, last)) in enumerate(zip(rows, parts)):
        view = None
        if last > first:
            own = (slice(index, index + 1), slice(None), slice(first, last))
            is_prompt = row.visibility.is_prompt(keys.shape[2])
            view = row.append(keys[own], values[own], is_prompt)
        views.append(RowView(view, first, last))
    return views

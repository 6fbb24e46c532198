"""Masks as mlx-lm's attention takes them, and which tokens and queries they are about."""

from typing import Optional, Union

import mlx.core as mx

# None (every query sees every token), "causal", or an array that broadcasts to
# (B, H_q, N, T): bool, or what is added to scores.
Mask = Optional[Union[str, mx.array]]


def lowest(dtype: mx.Dtype) -> float:
    """What hides a token in an additive mask: a row that sees none stays a row of numbers."""
    return max(-1e30, mx.finfo(dtype).min)


def checked(mask: Mask, queries: int, tokens: int) -> Mask:
    """``mask`` as it is, or an array made (B or 1, H_q or 1, N, T).

    Raises:
        ValueError: it is an array for other numbers of queries or tokens.
    """
    if not isinstance(mask, mx.array):
        return mask
    shape = (1,) * (4 - mask.ndim) + mask.shape
    if mask.ndim > 4 or shape[2] not in (1, queries) or shape[3] not in (1, tokens):
        raise ValueError(
            f"an attention mask of shape {mask.shape} does not fit {queries} queries and "
            f"{tokens} tokens: give one that broadcasts to (B, H, {queries}, {tokens})"
        )
    return mx.broadcast_to(mask.reshape(shape), (*shape[:2], queries, tokens))


def both(ours: Optional[mx.array], given: mx.array) -> mx.array:
    """What a bool mask, or None, and a given one show, both of the same tokens.

    Returns:
        A bool mask if ``given`` is one; else an additive one without infinities, fp32.
    """
    if given.dtype == mx.bool_:
        return given if ours is None else ours & given
    given = mx.maximum(given.astype(mx.float32), lowest(mx.float32))
    return given if ours is None else mx.where(ours, given, lowest(mx.float32))

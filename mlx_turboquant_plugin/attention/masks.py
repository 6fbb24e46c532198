"""Masks as mlx-lm's attention takes them, and which tokens and queries they are about."""

from collections.abc import Sequence

import mlx.core as mx

from ..cache.causal import Mask


def lowest(dtype: mx.Dtype) -> float:
    """What hides a token in an additive mask: a row that sees none stays a row of numbers."""
    # Half of the least number, since scores are added.
    return max(-1e30, mx.finfo(dtype).min / 2)


def check(mask: Mask, shape: Sequence[int | None]) -> None:
    """Raise if no attention over a compressed cache can honour ``mask``.

    Args:
        shape: (B, H_q, N, T); T is None where the tokens of mlx-lm's own cache have an order
            that the compressed one does not know.

    Raises:
        ValueError: it is an array that does not broadcast to ``shape``, or T is None; or a
            string other than "causal".
    """
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f'attention mask {mask!r}: allowed are None, "causal" and arrays')
    if not isinstance(mask, mx.array):
        return
    if shape[-1] is None:
        raise ValueError(
            f"attention of one query with a mask of shape {mask.shape} over a rotating cache "
            "that is full: mlx-lm's keeps its tokens in an order that the compressed one does "
            "not know. Pass mask=None, with which the query sees all tokens, or leave the model "
            "out with TURBOQUANT_OPT_OUT"
        )
    missing = len(shape) - mask.ndim
    if missing < 0 or any(n not in (1, size) for n, size in zip(mask.shape, shape[missing:])):
        raise ValueError(
            f"an attention mask of shape {mask.shape} does not fit {shape[2]} queries and "
            f"{shape[3]} tokens: give one that broadcasts to {tuple(shape)}"
        )


def checked(mask: Mask, queries: mx.array, columns: int | None) -> Mask:
    """``mask`` as it is, or an array made (B or 1, H_q or 1, N, T), bool or additive.

    Args:
        queries: (B, H_q, N, D); an additive mask gets their dtype, and is made finite.
        columns: T, see :func:`check`.

    Raises:
        ValueError: see :func:`check`.
    """
    if mask is None:
        return None
    shape, dtype = (*queries.shape[:3], columns), queries.dtype
    check(mask, shape)
    if not isinstance(mask, mx.array):
        return mask
    if mask.dtype != mx.bool_:
        mask = mx.maximum(mask.astype(dtype), mx.array(lowest(dtype), dtype))
    assert columns is not None, "check() refuses arrays then"
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return mx.broadcast_to(mask, (*mask.shape[:2], queries.shape[2], columns))


def both(ours: mx.array | None, given: mx.array) -> mx.array:
    """What a bool mask, or None, and a given one show, both of the same tokens.

    Returns:
        A bool mask if ``given`` is one; else an additive one, fp32.
    """
    if given.dtype == mx.bool_:
        return given if ours is None else ours & given
    given = given.astype(mx.float32)
    return given if ours is None else mx.where(ours, given, lowest(mx.float32))

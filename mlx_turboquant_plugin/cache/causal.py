"""The masks that caches have made, which are known to be causal: told from others by identity."""

import weakref

import mlx.core as mx

# None (every query sees every token), "causal", or an array that broadcasts to
# (B, H_q, N, T): bool, or what is added to scores.
Mask = str | mx.array | None

_made: dict[int, weakref.ref] = {}


def made(mask: Mask) -> Mask:
    """Note a causal ``mask`` that a cache makes for its next tokens, and return it."""
    if isinstance(mask, mx.array):
        key = id(mask)
        _made[key] = weakref.ref(mask, lambda _: _made.pop(key, None))
    return mask


def is_causal(mask: Mask) -> bool:
    """Whether ``mask`` is "causal", or an array that a cache has made."""
    if not isinstance(mask, mx.array):
        return mask == "causal"
    known = _made.get(id(mask))
    return known is not None and known() is mask

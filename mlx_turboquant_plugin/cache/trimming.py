"""Forgetting the newest tokens of a cache."""

import operator
from typing import TYPE_CHECKING, Any, SupportsIndex

import mlx.core as mx

from ..codecs.kv_codec import Codes
from .full_precision import FullPrecisionTokens

if TYPE_CHECKING:
    from .compressed import CompressedKVCache


def rewind(cache: "CompressedKVCache", offset: int) -> None:
    """Keep the first ``offset`` tokens of ``cache``, at most all of them.

    Raises:
        ValueError: it is a ring that can't, since it has forgotten older tokens.
    """
    if offset == cache.offset:
        return
    if not cache.is_trimmable():
        raise ValueError(
            f"a {type(cache).__name__} of {cache.offset} tokens can't be trimmed: it has forgotten "
            "older ones, which would be seen again; ask is_trimmable() before, and process the "
            "prompt again where it says no"
        )
    sinks, full_start = cache.visibility.sinks, cache.full_start
    full = sinks + max(0, offset - full_start) if offset > sinks else offset
    quantized = min(cache.quantized, offset, max(cache.visibility.full_from(offset), full_start))
    key_codes: Codes
    value_codes: Codes
    if quantized <= sinks:
        key_codes, value_codes, first_quantized, quantized = (), (), 0, 0
    elif quantized == cache.quantized:
        key_codes, value_codes, first_quantized = (
            cache.key_codes,
            cache.value_codes,
            cache.first_quantized,
        )
    else:
        first_quantized = cache.first_quantized
        count = quantized - first_quantized
        key_codes = tuple(mx.contiguous(x[..., :count]) for x in cache.key_codes)
        value_codes = tuple(mx.contiguous(x[..., :count, :]) for x in cache.value_codes)
    tokens = FullPrecisionTokens()
    if offset:
        held = cache.full_tokens.keys, cache.full_tokens.values
        tokens = FullPrecisionTokens(*(mx.contiguous(x[:, :, :full]) for x in held))
    cache.hold(tokens, key_codes, value_codes, first_quantized, quantized, offset)


def whole_number(n: SupportsIndex | mx.array) -> int:
    """A number of tokens, which may be an array of one.

    Raises:
        TypeError: it is not whole.
    """
    # Arrays of the first supported MLX are no indices.
    number: Any = n.item() if isinstance(n, mx.array) else n
    return operator.index(number)


def checked_offset(cache: "CompressedKVCache", offset: SupportsIndex) -> int:
    """An ``offset`` that a program has set itself.

    Raises:
        ValueError: the cache does not have so many tokens.
    """
    count = whole_number(offset)
    if not 0 <= count <= cache.offset:
        raise ValueError(
            f"offset can't be set to {count}, allowed is 0 to {cache.offset}, which trims this "
            f"{type(cache).__name__}: tokens that were trimmed are gone; use trim and "
            "update_and_fetch"
        )
    return count

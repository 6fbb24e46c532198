"""Forgetting the newest tokens of a cache."""

import operator
from typing import TYPE_CHECKING, SupportsIndex

import mlx.core as mx

from ..codecs.kv_codec import Codes
from .exact import ExactTokens

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
    sinks, exact_start = cache.visibility.sinks, cache.exact_start
    exact = sinks + max(0, offset - exact_start) if offset > sinks else offset
    coded = min(cache.coded, offset, max(cache.visibility.exact_from(offset), exact_start))
    key_codes: Codes
    value_codes: Codes
    if coded <= sinks:
        key_codes, value_codes, first_coded, coded = (), (), 0, 0
    elif coded == cache.coded:
        key_codes, value_codes, first_coded = cache.key_codes, cache.value_codes, cache.first_coded
    else:
        first_coded = cache.first_coded
        count = coded - first_coded
        key_codes = tuple(mx.contiguous(x[..., :count]) for x in cache.key_codes)
        value_codes = tuple(mx.contiguous(x[..., :count, :]) for x in cache.value_codes)
    tokens = ExactTokens()
    if offset:
        held = cache.exact_tokens.keys, cache.exact_tokens.values
        tokens = ExactTokens(*(mx.contiguous(x[:, :, :exact]) for x in held))
    cache.hold(tokens, key_codes, value_codes, first_coded, coded, offset)


def checked_offset(cache: "CompressedKVCache", offset: SupportsIndex) -> int:
    """An ``offset`` that a program has set itself.

    Raises:
        ValueError: the cache does not have so many tokens.
    """
    count = operator.index(offset)
    if not 0 <= count <= cache.offset:
        raise ValueError(
            f"offset can't be set to {count}, allowed is 0 to {cache.offset}, which trims this "
            f"{type(cache).__name__}: tokens that were trimmed are gone; use trim and "
            "update_and_fetch"
        )
    return count

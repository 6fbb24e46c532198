"""Writing the codes of a cache: of single blocks, or of all that a prompt asks for at once."""

from typing import TYPE_CHECKING

import mlx.core as mx

from ..backends.tokens import Tokens
from .adoption import check_placed
from .full_precision import FullPrecisionTokens
from .passes import plan_pass
from .view import View
from .visibility import BLOCK

if TYPE_CHECKING:
    from .compressed import CompressedKVCache

# How many tokens a batch encodes before it must: rows come to their blocks at different
# steps, and each time all of them are taken apart.
AHEAD = 64


def encode(cache: "CompressedKVCache", end: int) -> None:
    """Write the codes of the tokens before position ``end`` that have none."""
    start = cache.quantized
    if end <= max(start, cache.visibility.sinks):
        return
    check_placed(cache)
    skip = cache.sinks - cache.full_start
    keys, values = cache.full_tokens.part(start + skip, end + skip)
    older = cache.key_codes, cache.value_codes
    cache.key_codes, cache.value_codes = cache.backend.encode(
        cache.codec, keys, values, start, older
    )
    cache.quantized = end


def encode_ahead(cache: "CompressedKVCache") -> None:
    """Write codes that will be needed soon, so that they are there for a while."""
    needed = cache.visibility.full_from(cache.offset - 1)
    if needed > cache.visibility.sinks:
        encode(cache, min(cache.offset // BLOCK * BLOCK, needed + AHEAD))


def fuses(cache: "CompressedKVCache", keys: mx.array, values: mx.array) -> bool:
    """Whether fused kernels can make and read all that ``keys`` and ``values`` come to."""
    same = cache.full_tokens.dtypes == (keys.dtype, values.dtype)
    return same and cache.backend.passes(cache.codec, keys, values)


def encode_pass(
    cache: "CompressedKVCache", start: int, keys: mx.array, values: mx.array
) -> View | None:
    """Have fused kernels do all that a prompt's tokens from ``start`` on ask for at once.

    Args:
        keys, values: (B, H, N, D), those tokens, which the cache holds already.

    Returns:
        What their queries see, or None if nothing is to be encoded.
    """
    encode(cache, cache.visibility.full_from(start))
    codes = cache.key_codes, cache.value_codes
    plan = plan_pass(
        cache.visibility,
        cache.backend.fixed_shapes,
        cache.first_quantized,
        cache.quantized,
        cache.full_tokens.count,
        start,
        cache.offset,
    )
    if plan is None:
        return None
    check_placed(cache)
    view = cache.view_from(start, True)
    older = cache.full_tokens.before(keys.shape[2])
    tokens = Tokens(older, (keys, values), *codes, cache.first_quantized)
    done = cache.backend.run_pass(cache.codec, tokens, plan)
    cache.full_tokens = FullPrecisionTokens(*done.kept)
    cache.key_codes, cache.value_codes = done.key_codes, done.value_codes
    cache.quantized += len(plan.encoded)
    return view._replace(laid_out=done.laid_out)

"""Which attention answers a call of mlx-lm's function."""

from typing import Any, Callable, Optional

import mlx.core as mx

from ..cache.compressed import CompressedKVCache
from .bridge import attend_bridge
from .function import attention_functions
from .tiles import Mask, attend_tiles

BRIDGE = "bridge"


def attend(
    original: Callable,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: Optional[mx.array] = None,
) -> mx.array:
    """mlx-lm's ``scaled_dot_product_attention``, for compressed caches too.

    Args:
        original: mlx-lm's own function; it serves every other cache.
        queries: (B, H_q, N, D), as the other arguments those of mlx-lm's function.

    Raises:
        ValueError: ``sinks`` (learned attention sinks) with a compressed cache.
    """
    view = cache.view if isinstance(cache, CompressedKVCache) else None
    if view is None:
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    if sinks is not None:
        raise ValueError("attention sinks of the model are not supported by the compressed KV cache")
    if not view.coded:
        # Nothing is compressed yet: this is mlx-lm's own result, bit for bit.
        return original(queries, view.keys, view.values, cache=None, scale=scale, mask=mask)
    if cache.kernel == BRIDGE:
        return attend_bridge(original, queries, view, scale, mask)
    functions = attention_functions(view.codec.spec, cache.kernel == "compiled")
    return attend_tiles(queries, view, scale, mask, functions)

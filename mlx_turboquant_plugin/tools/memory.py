"""True bytes of caches at any length, counted in real caches."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache

from .arms import Arm

PIECE = 2048

# Heads and head dim of a layer's keys and of its values.
Shape = tuple[tuple[int, int], tuple[int, int]]


def layer_shapes(exact: list[Any]) -> list[Shape]:
    """The shape of each layer, from caches that have seen a token."""
    return [
        ((cache.keys.shape[1], cache.keys.shape[3]), (cache.values.shape[1], cache.values.shape[3]))
        for cache in exact
    ]


def bf16_bytes(shapes: Sequence[Shape], length: int) -> int:
    """What a KVCache in bfloat16 needs for ``length`` tokens, without its spare room."""
    return sum(2 * length * heads * dim for shape in shapes for heads, dim in shape)


def bytes_by_length(
    arm: Arm, model: nn.Module, shapes: Sequence[Shape], dtype: mx.Dtype, lengths: Sequence[int]
) -> list[int]:
    """Bytes of all layers at each of the ascending ``lengths``, without spare room.

    Bytes do not depend on what is in a cache, so random numbers serve, and of layers
    that are alike one is filled.
    """
    with arm.on():
        caches = arm.caches(model)
    kinds: dict[Any, list[Any]] = {}
    for cache, shape in zip(caches, shapes):
        codec = getattr(cache, "codec", None)
        kinds.setdefault((type(cache), codec and codec.spec, shape), []).append(cache)
    totals = [0] * len(lengths)
    for (_, _, shape), alike in kinds.items():
        cache, filled = alike[0], 0
        for index, length in enumerate(lengths):
            for start in range(filled, length, PIECE):
                count = min(PIECE, length - start)
                cache.update_and_fetch(
                    *(
                        mx.random.normal((1, heads, count, dim)).astype(dtype)
                        for heads, dim in shape
                    )
                )
                mx.eval(cache.state)
            filled = length
            totals[index] += len(alike) * _used(cache)
    return totals


def _used(cache: Any) -> int:
    if isinstance(cache, QuantizedKVCache) and cache.keys is not None:
        return cache.nbytes * cache.offset // cache.keys[0].shape[2]
    return cache.nbytes

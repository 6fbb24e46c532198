"""Attention of a few queries in one pass over the codes: what a fused kernel is given.

Nothing dequantised reaches memory. The kernels themselves, and what launches them, are
in ``kernels``; long blocks of queries and array masks are served by tiles.
"""

import functools
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import mlx.core as mx
import numpy as np

from ..cache.packed import PackedRows
from ..cache.view import View
from ..codecs.kv_codec import Codes, KVCodec
from ..kernels import fused_kernel
from ..log import log_once

# Speculative decoding verifies a few tokens at once; more are better served by tiles.
MAX_QUERIES = 8

_fallbacks: List[str] = []


@dataclass(frozen=True)
class Problem:
    """What one launch of a fused kernel reads.

    Attributes:
        codec: gives the rotations, the balance and the key bias.
        queries: (B, H_q, N, D), not scaled; N is at most 8.
        keys, values: exact, (B, H, E, D): ``sinks`` sinks, then the newest tokens of
            each row, the very newest last. Slot i from ``sinks`` on holds the position
            end - E + i, where ``end`` is one more than the position of the last query.
        key_codes, value_codes: see :class:`KVCodec`; index i stands for the position
            ``first_coded`` + i.
        bounds: int32 (B, N, 4), for each query: the first sink that it sees; the first
            position after the sinks that it sees; the first of those that it reads
            exactly, and not through its code; its own position, the last that it sees.
        scale: what scores are multiplied by.
    """

    codec: KVCodec
    queries: mx.array
    keys: mx.array
    values: mx.array
    sinks: int
    key_codes: Codes
    value_codes: Codes
    first_coded: int
    bounds: mx.array
    scale: float


def attend_fused(kernel: str, problem: Problem) -> Optional[mx.array]:
    """The attention (B, H_q, N, D_v), or None if the kernel can't do it, which is logged."""
    module = fused_kernel(kernel)
    missing = module.supports(problem)
    if missing is None:
        return module.attend(problem)
    fall_back(kernel, missing)
    return None


def fall_back(kernel: str, missing: str) -> None:
    """Say, once, that attention is left to the compiled functions because of ``missing``."""
    message = f"the {kernel} kernel does not support {missing}: the compiled one serves instead"
    if message not in _fallbacks:
        _fallbacks.append(message)
    log_once(message)


def fallbacks() -> List[str]:
    """What fused kernels had to leave to the compiled functions so far."""
    return list(_fallbacks)


def problem_of_view(queries: mx.array, view: View, scale: float) -> Problem:
    """The newest tokens of one cache: ``queries`` (B, H_q, N, D), with a causal mask."""
    bounds = tuple(
        _bounds(view, index, view.start + index) for index in range(queries.shape[2])
    )
    return Problem(
        view.codec,
        queries,
        view.keys,
        view.values,
        view.sinks,
        view.key_codes,
        view.value_codes,
        view.first_coded,
        _bounds_array((bounds,) * queries.shape[0]),
        scale,
    )


def problem_of_rows(queries: mx.array, rows: PackedRows, scale: float) -> Problem:
    """The newest token of every row of a batch: ``queries`` (B, H_q, 1, D)."""
    sinks = rows.visibility.sinks
    bounds = tuple(
        ((0, sinks, max(rows.visibility.exact_from(length - 1), start), length - 1),)
        for length, start in zip(rows.lengths, rows.exact_start)
    )
    return Problem(
        rows.codec,
        queries,
        rows.keys,
        rows.values,
        sinks,
        rows.key_codes,
        rows.value_codes,
        0,
        _bounds_array(bounds),
        scale,
    )


def _bounds(view: View, index: int, position: int) -> Tuple[int, int, int, int]:
    hidden, oldest = view.oldest(index)
    return hidden, oldest, max(oldest, view.exact_from(position)), position


# All layers ask for the same.
@functools.lru_cache(maxsize=4)
def _bounds_array(bounds: Sequence[Sequence[Tuple[int, int, int, int]]]) -> mx.array:
    # By way of NumPy, since lazy arrays must not be shared by threads.
    return mx.array(np.array(bounds, np.int32))

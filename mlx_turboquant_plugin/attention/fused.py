"""Attention of a few queries in one pass over the codes, by the kernels of a backend.

Nothing dequantized reaches memory. Long chunks of queries and masks given as arrays are left to
MLX's operations: see :mod:`~.dispatch`.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..backends import Backend
from ..backends.problem import Problem
from ..cache.batched_rows import BatchedRows
from ..cache.passes import StepPlan
from ..cache.view import View
from ..cache.visibility import Visibility
from ..log import log_once
from ..per_thread import cached_per_thread
from .layout import forget_masks

_fallbacks: list[str] = []
_listening: list[list[str]] = []


def attend_fused(
    queries: mx.array,
    source: View | BatchedRows,
    scale: float,
    learned_sinks: mx.array | None,
) -> mx.array | None:
    """Causal attention of ``queries`` (B, H_q, N, D) over the newest tokens of ``source``.

    Args:
        source: of one cache; or of batched rows, with N = 1.

    Returns:
        (B, H_q, N, D_v), or None if its backend can't do it, which is logged.
    """
    if isinstance(source, View):
        sinks, shared = source.plan.sinks, source.plan.shared
        bounds = _bounds_of_view(source.plan, queries.shape[0])
    else:
        sinks = source.visibility.sinks
        bounds, shared = _plan_of_rows(
            source.lengths,
            source.full_start,
            source.full_tokens.count,
            max(source.quantized),
            source.visibility,
        )
    problem = Problem(
        source.codec,
        queries,
        source.full_tokens,
        sinks,
        source.key_codes,
        source.value_codes,
        source.first_quantized,
        bounds,
        scale,
        learned_sinks,
        shared,
    )
    missing = source.backend.unsupported(problem)
    if missing is None:
        # A step has begun that needs none of a prompt's masks.
        forget_masks()
        return source.backend.attend(problem)
    fall_back(source.backend, missing)
    return None


def fall_back(backend: Backend, missing: str) -> None:
    """Say, once, that attention is left to MLX's operations because of ``missing``."""
    other = "compiled" if backend.compiled else "eager"
    message = (
        f"the {backend.name} kernel does not support {missing}: the {other} one serves instead"
    )
    for heard in (_fallbacks, *_listening):
        if message not in heard:
            heard.append(message)
    log_once(message)


def fallbacks() -> list[str]:
    """What fused kernels had to leave to MLX's operations since it was last forgotten."""
    return list(_fallbacks)


def forget_fallbacks() -> None:
    """Begin anew, as another configuration does."""
    _fallbacks.clear()


@contextmanager
def fallbacks_heard() -> Iterator[list[str]]:
    """A list that fills with what falls back meanwhile, also if it did so before."""
    heard: list[str] = []
    _listening.append(heard)
    try:
        yield heard
    finally:
        # Not remove(), which compares: another list may be as long and hold the same.
        _listening[:] = [other for other in _listening if other is not heard]


def _bounds_of_view(plan: StepPlan, batch: int) -> mx.array:
    known = plan.shared.get(("bounds", batch))
    if known is not None:
        return known
    bounds = []
    for position in range(plan.start, plan.end):
        hidden, oldest = plan.oldest(position - plan.start)
        full_from = max(oldest, plan.full_start, plan.visibility.full_from(position))
        first_code = max(0, oldest - plan.first_quantized)
        bounds.append(_bound(hidden, first_code, full_from, plan.quantized, plan.end))
    known = plan.shared["bounds", batch] = _bounds_array((tuple(bounds),) * batch)
    return known


# All layers ask for the same. By thread, as is what kernels make of it.
@cached_per_thread(maxsize=4)
def _plan_of_rows(
    lengths: tuple[int, ...],
    full_start: tuple[int, ...],
    held: int,
    quantized: int,
    visibility: Visibility,
) -> tuple[mx.array, dict[Any, Any]]:
    """The bounds of a :class:`Problem` and an empty ``shared``."""
    bounds = []
    for length, start in zip(lengths, full_start):
        full_from = max(visibility.full_from(length - 1), start)
        bounds.append((_bound(0, visibility.sinks, full_from, quantized, length),))
    return _bounds_array(tuple(bounds)), {}


def _bound(
    first_sink: int, first_code: int, full_from: int, quantized: int, end: int
) -> tuple[int, int, int, int]:
    """What :class:`Problem` says of one query that reads exactly from ``full_from`` on."""
    return first_sink, first_code, max(0, quantized - full_from), end - full_from


# Later steps ask for the same.
@functools.lru_cache(maxsize=256)
def _bounds_array(bounds: Sequence[Sequence[tuple[int, int, int, int]]]) -> mx.array:
    # By way of NumPy, since lazy arrays must not be shared by threads.
    return mx.array(np.array(bounds, np.int32))

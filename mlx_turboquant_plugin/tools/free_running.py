"""Greedy generation: where two runs part, each fed its own tokens."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from .arms import Arm
from .generation import common


@dataclass(frozen=True)
class Generation:
    """Greedily generated token ids, and tokens per second after the first."""

    tokens: list[int]
    speed: float


@dataclass(frozen=True)
class Agreement:
    """Two generations side by side.

    Attributes:
        same_for: the number of tokens before the first difference.
        agreement: share of places, 0 to 1, with the same token.
    """

    same_for: int
    agreement: float


def generate(
    arm: Arm, model: nn.Module, prompt: mx.array, count: int, progress: Callable[[int], Any]
) -> Generation:
    """Continue ``prompt`` (L,) by ``count`` tokens, past any end-of-text token."""
    tokens: list[int] = []
    with arm.on():
        caches = arm.caches(model)
        for token, _ in generate_step(prompt, model, max_tokens=count, prompt_cache=caches):
            if not tokens:
                start = time.perf_counter()
            tokens.append(int(token))
            progress(1)
        seconds = time.perf_counter() - start
    return Generation(tokens, (count - 1) / seconds)


def agreement(exact: list[int], other: list[int]) -> Agreement:
    """Compare generations of the same length."""
    equal = [a == b for a, b in zip(exact, other)]
    return Agreement(common(exact, other), sum(equal) / len(equal))

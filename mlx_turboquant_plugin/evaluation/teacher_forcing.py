"""The same tokens through an exact and a compressed cache: how far the logits differ.

Both runs are fed chunk by chunk in lockstep, so that the logits of one chunk are all
that is ever held.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, List

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Divergence:
    """Sums over positions; two of them can be added.

    Attributes:
        positions: how many positions were compared.
        kl_sum: sum of KL(exact || compressed), nats.
        agreed: at how many positions both runs rank the same token first.
        predicted: how many positions have a next token in the text.
        exact_nll, compressed_nll: sums of the negative log-likelihoods of these
            tokens, nats.
    """

    positions: int = 0
    kl_sum: float = 0.0
    agreed: int = 0
    predicted: int = 0
    exact_nll: float = 0.0
    compressed_nll: float = 0.0

    def __add__(self, other: "Divergence") -> "Divergence":
        return Divergence(
            self.positions + other.positions,
            self.kl_sum + other.kl_sum,
            self.agreed + other.agreed,
            self.predicted + other.predicted,
            self.exact_nll + other.exact_nll,
            self.compressed_nll + other.compressed_nll,
        )

    @property
    def kl(self) -> float:
        """Mean KL(exact || compressed) of a position, nats."""
        return self.kl_sum / self.positions

    @property
    def top1(self) -> float:
        """Share of positions, 0 to 1, at which both runs rank the same token first."""
        return self.agreed / self.positions

    @property
    def exact_perplexity(self) -> float:
        """Perplexity of the exact run, per token."""
        return math.exp(self.exact_nll / self.predicted)

    @property
    def perplexity(self) -> float:
        """Perplexity of the compressed run, per token."""
        return math.exp(self.compressed_nll / self.predicted)


def diverge(
    model: nn.Module,
    tokens: mx.array,
    chunk: int,
    exact: List[Any],
    compressed: List[Any],
    progress: Callable[[int], None] = lambda done: None,
) -> Divergence:
    """Feed ``tokens`` (L,) through two empty prompt caches and compare the logits.

    Compression must be on meanwhile: it serves uncompressed caches with mlx-lm's own
    attention.

    Args:
        chunk: tokens per forward pass; the last chunk may be shorter.
        exact, compressed: the caches, one for each layer; filled by this.
        progress: called with the number of tokens done after each chunk.
    """
    total = Divergence()
    for start in range(0, tokens.size, chunk):
        inputs = tokens[start : start + chunk]
        targets = tokens[start + 1 : start + 1 + chunk]
        p, q = (_log_probabilities(model, inputs, cache) for cache in (exact, compressed))
        total += _compare(p, q, targets)
        progress(start + inputs.size)
    return total


def _log_probabilities(model: nn.Module, inputs: mx.array, cache: List[Any]) -> mx.array:
    logits = model(inputs[None], cache=cache)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _compare(p: mx.array, q: mx.array, targets: mx.array) -> Divergence:
    """Compare log probabilities (N, vocabulary); ``targets`` may lack the last position's."""
    rows = mx.arange(targets.size)
    kl = mx.sum(mx.exp(p) * (p - q))
    agreed = mx.sum(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1))
    exact_nll, compressed_nll = (-mx.sum(x[rows, targets]) for x in (p, q))
    mx.eval(kl, agreed, exact_nll, compressed_nll)
    return Divergence(
        p.shape[0],
        kl.item(),
        agreed.item(),
        targets.size,
        exact_nll.item(),
        compressed_nll.item(),
    )

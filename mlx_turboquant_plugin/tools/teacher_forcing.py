"""The same tokens through an exact run and others: how far the logits differ.

All runs are fed chunk by chunk in lockstep: the exact logits are computed once for all
of them, and the logits of one chunk are all that is ever held.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..rules import SettingsError

# Feeds token ids (N,) to a run and gives its logits (N, vocabulary).
Forward = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Divergence:
    """How the logits of a run differ from the exact run's; two of them can be added.

    Attributes:
        kls: KL(exact || run) of each position, nats, float64 (N,).
        exact_choices, choices: the token ids that the exact run and this one rank first, (N,).
        exact_nlls, nlls: negative log-likelihoods of the tokens of the text in the exact
            run and in this one, nats, float64 (P,), P = the positions with a next token.
    """

    kls: np.ndarray
    exact_choices: np.ndarray
    choices: np.ndarray
    exact_nlls: np.ndarray
    nlls: np.ndarray

    def of_exact(self) -> "Divergence":
        """The exact run from itself."""
        kls = np.zeros_like(self.kls)
        choices, nlls = self.exact_choices, self.exact_nlls
        return Divergence(kls, choices, choices, nlls, nlls)

    def __add__(self, other: "Divergence") -> "Divergence":
        return join([self, other])

    @property
    def agrees(self) -> np.ndarray:
        """Whether both runs rank the same token first, bool (N,)."""
        return self.exact_choices == self.choices

    @property
    def positions(self) -> int:
        """How many positions were compared."""
        return len(self.kls)

    @property
    def kl(self) -> float:
        """Mean KL(exact || run) of a position, nats."""
        return float(self.kls.mean())

    @property
    def top1(self) -> float:
        """Share of positions, 0 to 1, at which both runs rank the same token first."""
        return float(self.agrees.mean())

    @property
    def exact_perplexity(self) -> float:
        """Perplexity of the exact run, per token."""
        return math.exp(self.exact_nlls.mean())

    @property
    def perplexity(self) -> float:
        """Perplexity of this run, per token."""
        return math.exp(self.nlls.mean())


def join(parts: Sequence[Divergence]) -> Divergence:
    """The divergence over the positions of all ``parts``, in their order."""
    fields = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("kls", "exact_choices", "choices", "exact_nlls", "nlls")
    )
    return Divergence(*fields)


def diverge(
    model: nn.Module, tokens: mx.array, chunk: int, exact: list[Any], compressed: list[Any]
) -> Divergence:
    """Feed ``tokens`` (L,) through two empty prompt caches and compare the logits.

    Compression must be on meanwhile: it serves uncompressed caches with mlx-lm's own
    attention.

    Args:
        chunk: tokens per forward pass; the last chunk may be shorter.
        exact, compressed: the caches, one for each layer; filled by this.
    """
    runs = (
        lambda inputs, caches=caches: model(inputs[None], cache=caches)[0]
        for caches in (exact, compressed)
    )
    exact_run, run = runs
    return lockstep(exact_run, [run], tokens, chunk)[0]


def lockstep(
    exact: Forward,
    runs: Sequence[Forward],
    tokens: mx.array,
    chunk: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Divergence]:
    """Feed ``tokens`` (L,) to the exact run and to ``runs``; the divergence of each of these.

    Args:
        chunk: tokens per forward pass; the last chunk may be shorter.
        progress: called with the number of tokens after each forward pass.

    Raises:
        SettingsError: the exact run gives NaN, so that there is nothing to compare with.
    """
    parts: list[list[Divergence]] = [[] for _ in runs]
    for start in range(0, tokens.size, chunk):
        inputs = tokens[start : start + chunk]
        targets = tokens[start + 1 : start + 1 + chunk]
        p = log_probabilities(exact(inputs))
        _check(p, start)
        progress(inputs.size)
        for run, done in zip(runs, parts):
            done.append(_compare(p, log_probabilities(run(inputs)), targets))
            progress(inputs.size)
    return [join(done) for done in parts]


def _check(p: mx.array, start: int) -> None:
    wrong = np.flatnonzero(np.array(mx.any(mx.isnan(p), axis=-1)))
    if wrong.size:
        raise SettingsError(
            f"the uncompressed run gives NaN at token {start + wrong[0]}, so that nothing can be "
            "compared with it: check the weights of --model, with mlx_lm.generate for one"
        )


def log_probabilities(logits: mx.array) -> mx.array:
    """Natural logarithms in float32, (N, vocabulary), from logits of any dtype."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _compare(p: mx.array, q: mx.array, targets: mx.array) -> Divergence:
    """Compare log probabilities (N, vocabulary); ``targets`` may lack the last position's."""
    rows = mx.arange(targets.size)
    kls = mx.sum(mx.exp(p) * (p - q), axis=-1)
    exact_choices, choices = (mx.argmax(x, axis=-1) for x in (p, q))
    exact_nlls, nlls = (-x[rows, targets] for x in (p, q))
    mx.eval(kls, exact_choices, choices, exact_nlls, nlls)
    return Divergence(
        np.array(kls, dtype=np.float64),
        np.array(exact_choices),
        np.array(choices),
        np.array(exact_nlls, dtype=np.float64),
        np.array(nlls, dtype=np.float64),
    )

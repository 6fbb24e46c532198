"""What a run answers, after a context that was read, loaded from a file or trimmed back to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache

from .arms import Arm, Run
from .tasks import Prompt
from .teacher_forcing import log_probabilities

# Tokens that a cache reads after the context and loses again: more than the 16 that leave
# no trace, as when a server finds the beginning of a prompt in an earlier conversation.
TRIMMED = 128


@dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    Attributes:
        nats: log-probability of the right answer.
        likeliest: whether it is more probable than all wrong ones.
        greedy: whether greedy generation gives it, token by token.
    """

    nats: float
    likeliest: bool
    greedy: bool


def answer(
    arm: Arm, model: nn.Module, prompt: Prompt, chunk: int, progress: Callable[[int], Any]
) -> dict[str, Answer]:
    """The answers by where the cache came from: "read", "loaded" or "trimmed".

    Args:
        chunk: tokens per forward pass.
        progress: called with the number of tokens of the context.
    """
    run = Run(arm, model)
    run.read(prompt.context, chunk)
    progress(prompt.context.size)
    return {
        origin: _answer(make(run, prompt, chunk), prompt, chunk) for origin, make in ORIGINS.items()
    }


def _read(run: Run, prompt: Prompt, chunk: int) -> Run:
    return run.fork()


def _loaded(run: Run, prompt: Prompt, chunk: int) -> Run:
    other = run.fork()
    with TemporaryDirectory() as folder, run.arm.on():
        file = str(Path(folder) / "context.safetensors")
        save_prompt_cache(file, run.caches)
        other.caches = load_prompt_cache(file)
        # A file that is gone can't be read later.
        mx.eval([cache.state for cache in other.caches])
    return other


def _trimmed(run: Run, prompt: Prompt, chunk: int) -> Run:
    other = run.fork()
    extra = prompt.context[:TRIMMED]
    other.read(extra, chunk)
    trim_prompt_cache(other.caches, extra.size)
    return other


ORIGINS = {"read": _read, "loaded": _loaded, "trimmed": _trimmed}


def _answer(run: Run, prompt: Prompt, chunk: int) -> Answer:
    first = log_probabilities(run.read(prompt.question, chunk))[-1]
    right = _nats(run, first, prompt.answer)
    best_wrong = max(_nats(run, first, other) for other in prompt.others)
    said = [mx.argmax(first).item()]
    while len(said) < len(prompt.answer):
        said.append(mx.argmax(run(mx.array(said[-1:]))[-1]).item())
    return Answer(right, right > best_wrong, said == prompt.answer)


def _nats(run: Run, first: mx.array, tokens: list[int]) -> float:
    """Log-probability of ``tokens``, of whose first ``first`` (vocabulary,) has all."""
    nats = first[tokens[0]]
    if len(tokens) > 1:
        rest = log_probabilities(run.fork()(mx.array(tokens[:-1])))
        nats = nats + mx.sum(rest[mx.arange(len(tokens) - 1), mx.array(tokens[1:])])
    return float(nats)

"""Processing prompts with mlx-lm's own loops, up to the first token that follows each."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step


def lengths(longest: int, batch: int) -> list[int]:
    """Tokens of each prompt of a batch, spread evenly from an eighth of ``longest`` up to it."""
    if batch == 1:
        return [longest]
    steps = 8 * (batch - 1)
    return [max(1, longest * (batch - 1 + 7 * row) // steps) for row in range(batch)]


def process_one(
    model: nn.Module,
    prompt: mx.array,
    caches: list[Any],
    chunk: int,
    progress: Callable[[int, int], None],
) -> list[Any]:
    """Process ``prompt`` (T,) as ``mlx_lm.generate`` does; returns ``caches``, filled.

    Args:
        chunk: tokens at a time.
        progress: called with the tokens done and all tokens; may raise to stop.
    """
    # Asked for no tokens it ends when it knows the first.
    steps = generate_step(
        prompt,
        model,
        max_tokens=0,
        prompt_cache=caches,
        prefill_step_size=chunk,
        prompt_progress_callback=progress,
    )
    for _ in steps:
        pass
    return caches


def process_batch(
    model: nn.Module, prompts: list[mx.array], caches: list[list[Any]], chunk: int
) -> list[Any]:
    """Process ragged prompts as ``mlx_lm.server`` does; returns the caches of all rows, filled.

    A row leaves the batch once its first token is known. Its caches are kept as the server
    keeps them: as those of a single sequence.

    Args:
        caches: empty ones for each row.
        chunk: tokens of each row at a time.
    """
    generator = BatchGenerator(
        model, max_tokens=1, prefill_batch_size=len(prompts), prefill_step_size=chunk
    )
    with closing(generator):
        tokens: list[Any] = [prompt.tolist() for prompt in prompts]
        generator.insert(tokens, caches=caches)
        done: list[Any] = []
        while responses := generator.next_generated():
            for response in responses:
                done += response.prompt_cache
        # It has begun with a second token.
        mx.synchronize(generator.stream)
    return done

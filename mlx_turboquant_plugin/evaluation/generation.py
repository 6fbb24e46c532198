"""One generation with mlx-lm, and two of them side by side."""

from dataclasses import dataclass
from typing import Any, Iterator, List, Sequence, Tuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate

from .runs import coded_tokens, kv_bytes


@dataclass(frozen=True)
class Generation:
    """What one run of ``mlx_lm.stream_generate`` gave.

    Attributes:
        tokens: the generated token ids.
        prompt_speed, speed: tokens per second of the prompt and of the generation.
        cached: tokens in the cache at the end.
        coded: how many of these are held as codes.
        kv_bytes: bytes of the caches of all layers at the end.
        peak_bytes: most memory in use at a time, beyond the model's weights.
    """

    text: str
    tokens: List[int]
    prompt_speed: float
    speed: float
    cached: int
    coded: int
    kv_bytes: int
    peak_bytes: int


def generate(
    model: nn.Module, tokenizer: Any, prompt: List[int], max_tokens: int, caches: List[Any]
) -> Generation:
    """Continue ``prompt`` by at most ``max_tokens`` after what ``caches`` hold."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    text, tokens = "", []
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, prompt_cache=caches
    ):
        text += response.text
        tokens.append(response.token)
    return Generation(
        text,
        tokens,
        response.prompt_tps,
        response.generation_tps,
        caches[0].offset,
        coded_tokens(caches),
        kv_bytes(caches),
        mx.get_peak_memory() - before,
    )


def side_by_side(rows: Sequence[Tuple[str, str, str, str]]) -> Iterator[str]:
    """A table of both runs: title, uncompressed, compressed, and a note."""
    for title, a, b, note in [("", "uncompressed", "compressed", ""), *rows]:
        yield f"{title:22} {a:>13} {b:>13}{note}"


def kv_row(exact: Generation, ours: Generation) -> Tuple[str, str, str, str]:
    """The row of that table about the memory of the caches."""
    ratio = f"  uncompressed / compressed = {exact.kv_bytes / ours.kv_bytes:.2f}"
    return "KV cache, bytes", f"{exact.kv_bytes:,}", f"{ours.kv_bytes:,}", ratio


def common(a: List[int], b: List[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

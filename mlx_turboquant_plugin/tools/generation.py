"""One generation with mlx-lm, and two of them side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.models.cache import KVCache

from .runs import kv_bytes, quantized_tokens

SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Generation:
    """What one run of ``mlx_lm.stream_generate`` gave.

    Attributes:
        tokens: the generated token ids.
        prompt_speed, speed: tokens per second of the prompt and of the generation.
        cached: tokens in the cache at the end.
        quantized: how many of these are held as codes.
        kv_bytes: bytes of the caches of all layers at the end.
        peak_bytes: most memory in use at a time, beyond the model's weights.
    """

    text: str
    tokens: list[int]
    prompt_speed: float
    speed: float
    cached: int
    quantized: int
    kv_bytes: int
    peak_bytes: int


def generate(
    model: nn.Module, tokenizer: Any, prompt: list[int], max_tokens: int, caches: list[Any]
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
        quantized_tokens(caches),
        kv_bytes(caches),
        mx.get_peak_memory() - before,
    )


def texts(exact: Generation, ours: Generation) -> Iterator[str]:
    """What both runs wrote, and how long it is the same."""
    yield f"uncompressed: {_short(exact.text)}"
    yield f"compressed:   {_short(ours.text)}"
    same = common(exact.tokens, ours.tokens)
    yield f"the same for {same} of {len(exact.tokens)} tokens; after a close choice texts part"


def table(
    exact: Generation, ours: Generation, read: str, written: str, row: tuple[str, str, str, str]
) -> Iterator[str]:
    """Speed and memory of both runs.

    Args:
        read, written: what the prompt and the generation are called.
        row: another one: title, uncompressed, compressed, and a note.
    """
    # Where nothing is compressed it would be the ratio of the room that both keep.
    ratio = ""
    if ours.quantized:
        ratio = f"  uncompressed / compressed = {exact.kv_bytes / ours.kv_bytes:.2f}"
    for title, a, b, note in (
        ("", "uncompressed", "compressed", ""),
        (f"{read}, tokens/s", f"{exact.prompt_speed:.1f}", f"{ours.prompt_speed:.1f}", ""),
        (f"{written}, tokens/s", f"{exact.speed:.1f}", f"{ours.speed:.1f}", ""),
        ("KV cache, bytes", f"{exact.kv_bytes:,}", f"{ours.kv_bytes:,}", ratio),
        row,
    ):
        yield f"{title:22} {a:>13} {b:>13}{note}"
    yield f"KVCache's bytes hold room for more tokens: it grows in steps of {KVCache.step}"


def common(a: Sequence, b: Sequence) -> int:
    """How many tokens, or characters, two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " ..."

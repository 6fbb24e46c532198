"""``mlx_turboquant demo``: the same generation with and without compression."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate

from .. import compiling
from ..activation import disable
from ..reporting import Status, status
from .arguments import at_least
from .runs import coded_tokens, compressed, compressed_prompt_cache, kv_bytes, load_model
from .runs import prompt_cache
from .teacher_forcing import diverge

MODEL = Path(__file__).parents[1] / "demo_model"
PROMPT = Path(__file__).with_name("demo_prompt.txt")
CHUNK = 128
SHOWN_CHARACTERS = 160
# Tokens: another block is encoded in that time.
WARM_UP = 40


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--model", default=str(MODEL), help="folder or Hub name (default: a tiny model, shipped)"
    )
    parser.add_argument("--prompt", help="text to continue (default: a long one, shipped)")
    parser.add_argument("--max-tokens", type=at_least(1), default=150, help="to generate (150)")


def run(args: argparse.Namespace) -> int:
    """Generate twice, compare, print.

    Returns:
        0; a model that can't be loaded or compressed is raised as SettingsError.
    """
    disable()  # TURBOQUANT=1 would compress the exact run too
    compiling.here()
    model, tokenizer = load_model(args.model)
    prompt = tokenizer.encode(PROMPT.read_text("utf-8") if args.prompt is None else args.prompt)
    # The first time is for whatever is done once.
    for count in (min(WARM_UP, args.max_tokens), args.max_tokens):
        exact = _generate(model, tokenizer, prompt, count, prompt_cache(model))
        with compressed(bypass=None):
            ours = _generate(model, tokenizer, prompt, count, compressed_prompt_cache(model))
            snapshot = status()
    sys.stdout.write("\n".join(_generated(snapshot, len(prompt), exact, ours)) + "\n")
    # In bfloat16 rounding alone would flip a close choice now and then.
    model.set_dtype(mx.float32)
    tokens = mx.array([*prompt, *exact.tokens])
    exact_cache = prompt_cache(model)
    # What decoding reads: a prompt's own tokens would be exact, and flatter the codes.
    with compressed(bypass=None, invariant=True):
        forced = diverge(model, tokens, CHUNK, exact_cache, compressed_prompt_cache(model))
    sys.stdout.write(
        f"\nagreement, both fed the {forced.positions} tokens of the uncompressed run (in float32): the "
        f"same next token is likeliest at {forced.top1:.2%} of them, mean KL {forced.kl:.1e} nats\n"
    )
    return 0


def _generate(
    model: nn.Module, tokenizer: Any, prompt: List[int], max_tokens: int, caches: List[Any]
) -> Generation:
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


def _generated(
    snapshot: Status, prompt: int, exact: Generation, ours: Generation
) -> Iterator[str]:
    yield snapshot.models[-1]
    yield (
        f"prompt of {prompt} tokens, {len(exact.tokens)} generated; {ours.coded} of the "
        f"{ours.cached} tokens in the cache are compressed"
    )
    if not ours.coded:
        yield (
            "nothing is compressed in so short a text: the first and the newest tokens stay "
            "exact; give a longer --prompt or more --max-tokens"
        )
    yield f"kernel: {snapshot.kernel_in_words}"
    yield ""
    yield f"uncompressed: {_short(exact.text)}"
    yield f"compressed:   {_short(ours.text)}"
    same = _common(exact.tokens, ours.tokens)
    yield f"the same for {same} of {len(exact.tokens)} tokens; after a close choice texts part"
    yield ""
    yield f"{'':22} {'uncompressed':>13} {'compressed':>13}"
    for title, a, b, note in (
        ("prompt, tokens/s", f"{exact.prompt_speed:.0f}", f"{ours.prompt_speed:.0f}", ""),
        ("generation, tokens/s", f"{exact.speed:.1f}", f"{ours.speed:.1f}", ""),
        (
            "KV cache, bytes",
            f"{exact.kv_bytes:,}",
            f"{ours.kv_bytes:,}",
            f"  uncompressed / compressed = {exact.kv_bytes / ours.kv_bytes:.2f}",
        ),
        (
            "peak memory, bytes",
            f"{exact.peak_bytes:,}",
            f"{ours.peak_bytes:,}",
            "  beyond the weights",
        ),
    ):
        yield f"{title:22} {a:>13} {b:>13}{note}"


def _common(a: List[int], b: List[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " ..."

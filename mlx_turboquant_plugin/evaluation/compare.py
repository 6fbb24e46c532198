"""``mlx_turboquant compare``: what each preset costs in quality and saves in memory."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, Callable, Iterator, List, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..activation import disable
from ..reporting import status
from ..settings import BYPASSES, PRESETS, SettingsError
from . import texts
from .arguments import at_least
from .runs import coded_tokens, compressed, compressed_prompt_cache, kv_bytes, load_model
from .runs import prompt_cache
from .teacher_forcing import Divergence, diverge


@dataclass(frozen=True)
class Result:
    """One preset against the exact run.

    Attributes:
        key_bits, value_bits: what the preset stands for.
        kl: mean KL(exact || compressed) of a position, nats.
        top1: share of positions, 0 to 1, at which both rank the same token first.
        exact_perplexity, perplexity: per token, without and with compression.
        perplexity_change: relative, 0.01 is one per cent.
        kv_bytes_per_token: of all layers at the end of a window, everything counted.
        kv_ratio: how many times smaller that is than a KVCache in bfloat16.
        coded_tokens: how many tokens of a window are held as codes at its end.
    """

    preset: str
    key_bits: int
    value_bits: int
    kl: float
    top1: float
    exact_perplexity: float
    perplexity: float
    perplexity_change: float
    kv_bytes_per_token: float
    kv_ratio: float
    coded_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("--model", required=True, help="folder or Hub name of a model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="a text in UTF-8")
    source.add_argument("--tokens", metavar="FILE", help="token ids as .npy, the first one is bos")
    parser.add_argument("--windows", type=at_least(1), default=2, help="pieces of text (2)")
    parser.add_argument("--length", type=at_least(2), default=2048, help="tokens of each (2048)")
    parser.add_argument(
        "--chunk", type=at_least(1), default=128, help="tokens per forward pass (128)"
    )
    presets = list(PRESETS)
    parser.add_argument("--presets", nargs="+", choices=presets, default=presets)
    parser.add_argument("--bypass", choices=BYPASSES, help="run every preset with this bypass")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Measure every preset and print a table.

    Returns:
        0; what is wrong with the arguments is raised as SettingsError.
    """
    disable()  # TURBOQUANT=1 would compress the exact run too
    tokens = texts.read_token_file(args.tokens) if args.tokens else None
    model, tokenizer = load_model(args.model)
    if tokens is None:
        tokens = texts.read_text_file(args.text, tokenizer)
    first_repeats = args.tokens is not None or tokens[:1] == [tokenizer.bos_token_id]
    windows = texts.windows(tokens, args.windows, args.length, first_repeats)
    dtype, vocabulary = _probe(model)
    texts.check_ids(np.concatenate(windows), vocabulary)
    model.set_dtype(mx.float32)
    results = [
        _measure(model, windows, args.chunk, dtype, preset, args.bypass)
        for preset in args.presets
    ]
    notes = {
        "model": args.model,
        "source": args.tokens or args.text,
        "windows": args.windows,
        "length": args.length,
        "chunk": args.chunk,
        "bypass": args.bypass,
        "quality_dtype": "float32",
        "kv_bytes_dtype": str(dtype).removeprefix("mlx.core."),
    }
    if args.json:
        text = json.dumps({**notes, "results": [asdict(r) for r in results]}, indent=2)
    else:
        text = "\n".join(_lines(notes, results))
    sys.stdout.write(text + "\n")
    return 0


def _probe(model: nn.Module):
    """The dtype that the model's caches hold, and the size of its vocabulary."""
    caches = prompt_cache(model)
    # Never evaluated: the shape and the dtype are known without.
    logits = model(mx.zeros((1, 1), mx.int32), cache=caches)
    return caches[0].keys.dtype, logits.shape[-1]


def _measure(
    model: nn.Module,
    windows: List[np.ndarray],
    chunk: int,
    dtype: mx.Dtype,
    preset: str,
    bypass: Optional[str],
) -> Result:
    total = Divergence()
    for number, window in enumerate(windows, 1):
        exact = prompt_cache(model)
        with compressed(preset=preset, bypass=bypass):
            settings = status().settings
            total += diverge(
                model,
                mx.array(window),
                chunk,
                exact,
                compressed_prompt_cache(model),
                _counter(f"{preset}: window {number} of {len(windows)}", len(window)),
            )
            refilled = _refill(exact, compressed_prompt_cache(model), chunk, dtype)
    kv_bytes_bf16 = sum(
        2 * (cache.keys[:, :, : cache.offset].size + cache.values[:, :, : cache.offset].size)
        for cache in exact
    )
    return Result(
        preset,
        settings["key_bits"]["value"],
        settings["value_bits"]["value"],
        total.kl,
        total.top1,
        total.exact_perplexity,
        total.perplexity,
        total.perplexity / total.exact_perplexity - 1,
        kv_bytes(refilled) / len(windows[-1]),
        kv_bytes_bf16 / kv_bytes(refilled),
        coded_tokens(refilled),
    )


def _refill(exact: List[Any], caches: List[Any], chunk: int, dtype: mx.Dtype) -> List[Any]:
    """Write what ``exact`` holds to empty ``caches``, in the model's own dtype.

    With weights in float32 the exact tokens of a compressed cache are float32 too,
    which no user has: bytes are counted in the dtype of a normal run.
    """
    for source, target in zip(exact, caches):
        for start in range(0, source.offset, chunk):
            rows = slice(start, min(start + chunk, source.offset))
            keys, values = (x[:, :, rows].astype(dtype) for x in (source.keys, source.values))
            target.update_and_fetch(keys, values)
            mx.eval(target.state)
    return caches


def _counter(title: str, length: int) -> Callable[[int], None]:
    """Shows progress on one line of a terminal, and nothing anywhere else."""

    def show(done: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == length else ""
            sys.stderr.write(f"\r{title}, {done} of {length} tokens{end}")
            sys.stderr.flush()

    return show


def _lines(notes: dict, results: List[Result]) -> Iterator[str]:
    yield (
        f"{notes['model']}: {notes['windows']} x {notes['length']} tokens of {notes['source']} "
        f"in chunks of {notes['chunk']}" + (f", bypass {notes['bypass']}" if notes["bypass"] else "")
    )
    yield (
        f"quality: weights in {notes['quality_dtype']}; exact perplexity "
        f"{results[0].exact_perplexity:.4f}"
    )
    yield (
        f"KV bytes: counted in caches filled in {notes['kv_bytes_dtype']}, against a KVCache in "
        f"bfloat16 of {notes['length']} tokens, {results[0].coded_tokens} of which are compressed"
    )
    yield ""
    yield (
        f"{'preset':8} {'bits K/V':>8} {'mean KL':>9} {'top-1':>7} {'perplexity':>10} "
        f"{'change':>8} {'KV B/token':>10} {'smaller':>8}"
    )
    for r in results:
        yield (
            f"{r.preset:8} {f'{r.key_bits}/{r.value_bits}':>8} {r.kl:9.2e} {r.top1:7.2%} "
            f"{r.perplexity:10.4f} {r.perplexity_change:+8.2%} {r.kv_bytes_per_token:10.1f} "
            f"{f'{r.kv_ratio:.2f}x':>8}"
        )

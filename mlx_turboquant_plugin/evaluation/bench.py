"""``mlx_turboquant bench``: speed and memory against mlx-lm's KVCache, side by side in one run.

Machines are noisy: what counts are the ratios, whose two sides take turns.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any, Callable, Dict, Iterator, List

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from .. import settings
from ..activation import disable
from ..attention.dispatch import attend
from ..attention.kernels import resolve_kernel
from ..cache import BatchCompressedKVCache, CompressedKVCache, Visibility
from ..codecs.kv_codec import CodecSpec, KVCodec
from .demo import MODEL
from .runs import compressed, compressed_prompt_cache, kv_bytes, load_model, prompt_cache

MIB = 2**20
DECODED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="of the cache")
    parser.add_argument(
        "--heads", type=int, nargs=2, default=[8, 2], metavar=("QUERY", "KV"), help="of the layer"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences, of one layer")
    parser.add_argument("--head-dim", type=int, default=128, help="of the layer")
    parser.add_argument("--repeats", type=int, default=20, help="decode steps of each arm")
    parser.add_argument(
        "--model", default=str(MODEL), help="of the prefill: folder or Hub name (default: shipped)"
    )
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prefill")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one prefill step")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        0; bad settings and models that can't be loaded are raised as SettingsError.
    """
    chosen = settings.load().general
    result = {
        "kernel": resolve_kernel(chosen.kernel),
        "decode": [
            decode(args, chosen, length, batch) for batch in args.batch for length in args.lengths
        ],
        "prefill": prefill(args),
    }
    text = json.dumps(result, indent=2) if args.json else "\n".join(_lines(args, result))
    sys.stdout.write(text + "\n")
    return 0


def decode(
    args: argparse.Namespace, chosen: settings.Settings, length: int, batch: int
) -> Dict[str, Any]:
    """One decode step of one attention layer: median milliseconds of each arm.

    The arms are mlx-lm's KVCache and attention, and the compressed ones, in fp32 and fp16;
    for several sequences of the same length the batched forms of both.
    """
    (heads, kv_heads), dim = args.heads, args.head_dim
    spec = CodecSpec(
        dim, dim, chosen.key_codec, chosen.key_bits, chosen.value_codec, chosen.value_bits
    )
    codec, visibility = KVCodec(spec), Visibility(chosen.window, chosen.sinks)
    kernel = resolve_kernel(chosen.kernel)
    arms: Dict[str, Callable[[], mx.array]] = {}
    for dtype in (mx.float32, mx.float16):
        query = mx.random.normal((batch, heads, 1, dim)).astype(dtype)
        token = mx.random.normal((batch, kv_heads, 1, dim)).astype(dtype)
        stock = [KVCache() for _ in range(batch)]
        ours = [CompressedKVCache(codec, visibility, kernel) for _ in range(batch)]
        for row in zip(stock, ours):
            keys, values = mx.random.normal((2, 1, kv_heads, length, dim)).astype(dtype)
            for cache in row:
                cache.update_and_fetch(keys, values)
                mx.eval(cache.state)
        mx.eval(query, token)
        name = str(dtype).rpartition(".")[2]
        for arm, caches in (("kvcache", stock), ("compressed", ours)):
            cache = caches[0] if batch == 1 else caches[0].merge(caches)
            arms[f"{arm} {name}"] = _step(cache, query, token)
    times = _alternate(arms, args.repeats)
    milliseconds = {name: 1e3 * seconds for name, seconds in times.items()}
    return {"tokens": length, "batch": batch, **milliseconds}


def prefill(args: argparse.Namespace) -> Dict[str, Any]:
    """Time and peak memory, beyond the weights, of a prompt in chunks, and of decoding after it."""
    disable()  # TURBOQUANT=1 would compress both arms
    model, _ = load_model(args.model)
    tokens = mx.random.randint(0, model.args.vocab_size, (1, args.prompt), key=mx.random.key(0))
    mx.eval(tokens)
    arms = {"kvcache": _prefill(model, tokens, args.chunk, prompt_cache(model))}
    with compressed():
        arms["compressed"] = _prefill(model, tokens, args.chunk, compressed_prompt_cache(model))
    return {
        "tokens": args.prompt,
        "chunk": args.chunk,
        **arms,
        "compressed / kvcache": {
            what: value / arms["kvcache"][what] for what, value in arms["compressed"].items()
        },
    }


def _prefill(model: Any, tokens: mx.array, chunk: int, caches: List[Any]) -> Dict[str, float]:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    start = time.perf_counter()
    for first in range(0, tokens.shape[1], chunk):
        logits = model(tokens[:, first : first + chunk], cache=caches)[:, -1:]
        mx.eval(logits, [cache.state for cache in caches])
    seconds = time.perf_counter() - start
    peak = mx.get_peak_memory() - before
    mx.reset_peak_memory()
    for _ in range(DECODED):
        logits = model(mx.argmax(logits, axis=-1), cache=caches)
        mx.eval(logits)
    return {
        "prefill s": seconds,
        "prefill peak MiB": peak / MIB,
        "decode peak MiB": (mx.get_peak_memory() - before) / MIB,
        "cache MiB": kv_bytes(caches) / MIB,
    }


def _step(cache: Any, query: mx.array, token: mx.array) -> Callable[[], mx.array]:
    scale = query.shape[-1] ** -0.5

    def step():
        if isinstance(cache, (CompressedKVCache, BatchCompressedKVCache)):
            cache.attending = True
        mask = create_attention_mask(token[:, 0], cache)
        keys, values = cache.update_and_fetch(token, token)
        return attend(scaled_dot_product_attention, query, keys, values, cache, scale, mask)

    return step


def _alternate(arms: Dict[str, Callable[[], mx.array]], repeats: int) -> Dict[str, float]:
    """Median seconds of each arm, the arms taking turns."""
    times: Dict[str, List[float]] = {name: [] for name in arms}
    for _ in range(repeats + 2):
        for name, step in arms.items():
            start = time.perf_counter()
            mx.eval(step())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def _lines(args: argparse.Namespace, result: Dict[str, Any]) -> Iterator[str]:
    heads, kv_heads = args.heads
    yield (
        f"decode, one layer, {heads} query and {kv_heads} KV heads of {args.head_dim}, kernel "
        f"{result['kernel']}: milliseconds a step, and how many times faster than KVCache"
    )
    yield f"{'tokens':>8} {'batch':>6} {'dtype':>8} {'KVCache':>9} {'compressed':>11} {'ratio':>6}"
    for row in result["decode"]:
        for dtype in ("float32", "float16"):
            stock, ours = row[f"kvcache {dtype}"], row[f"compressed {dtype}"]
            yield (
                f"{row['tokens']:>8} {row['batch']:>6} {dtype:>8} "
                f"{stock:>9.2f} {ours:>11.2f} {stock / ours:>6.2f}"
            )
    yield ""
    report = result["prefill"]
    yield f"prefill of {report['tokens']} tokens in steps of {report['chunk']}, {args.model}"
    yield f"{'':18} {'KVCache':>9} {'compressed':>11} {'compressed / KVCache':>21}"
    for what, ratio in report["compressed / kvcache"].items():
        stock, ours = report["kvcache"][what], report["compressed"][what]
        yield f"{what:18} {stock:>9.2f} {ours:>11.2f} {ratio:>21.2f}"

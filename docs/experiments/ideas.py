"""What the exact key bias and the balance are worth: each left out in turn.

Run it as

    python docs/experiments/ideas.py --model PATH --tokens FILE
"""

import time

import mlx.core as mx
from common import changed_caches, load, measure

from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.tools.runs import compressed

ARMS = {
    "bias and balance": lambda i, c: c,
    "no balance": lambda i, c: KVCodec(c.spec, None, c.bias, c.layout),
    "no bias": lambda i, c: KVCodec(c.spec, c.balance, None, c.layout),
    "neither": lambda i, c: KVCodec(c.spec, None, None, c.layout),
}
REPEATS = 40


def decode_milliseconds(model, window) -> dict:
    """The best of some decode steps after a window, all arms in turn: of the whole model."""
    best = dict.fromkeys(ARMS, float("inf"))
    with compressed():
        caches = {name: changed_caches(model, change) for name, change in ARMS.items()}
        for own in caches.values():
            mx.eval(model(mx.array(window)[None], cache=own), [c.state for c in own])
        for token in window[:REPEATS]:
            for name, own in caches.items():
                start = time.perf_counter()
                mx.eval(model(mx.array([[int(token)]]), cache=own))
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def fixed_bytes(model, change) -> int:
    """Bytes beside the cache, whatever its length: factors, biases and rotary tables."""
    with compressed():
        codecs = [cache.codec for cache in changed_caches(model, change)]
    tables = {id(c.bias.table): c.bias.table.nbytes for c in codecs if c.bias is not None}
    return sum(tables.values()) + sum(
        (0 if c.balance is None else c.balance.nbytes)
        + (0 if c.bias is None else c.bias.bias.nbytes)
        for c in codecs
    )


def main():
    model, windows, args = load(__doc__)
    print(f"{args.model}: {args.windows} x {args.length} tokens, preset default")
    print(f"{'':17} {'mean KL':>8} {'top-1':>7} {'ppl':>8} {'decode ms':>10} {'fixed bytes':>12}")
    times = decode_milliseconds(model, windows[0])
    for name, d in measure(model, windows, args.chunk, ARMS).items():
        change = d.perplexity / d.exact_perplexity - 1
        print(
            f"{name:17} {d.kl:8.1e} {d.top1:7.2%} {change:+8.2%} "
            f"{times[name]:10.2f} "
            f"{fixed_bytes(model, ARMS[name]):12,}"
        )


if __name__ == "__main__":
    main()

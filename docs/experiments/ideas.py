"""What the exact key bias and the balance are worth: each left out in turn.

    python docs/experiments/ideas.py --model PATH --tokens FILE
"""

import time

import mlx.core as mx
from common import changed_caches, load, measure

from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.evaluation.runs import compressed

ARMS = {
    "bias and balance": lambda c: c,
    "no balance": lambda c: KVCodec(c.spec, None, c.bias),
    "no bias": lambda c: KVCodec(c.spec, c.balance, None),
    "neither": lambda c: KVCodec(c.spec, None, None),
}
REPEATS = 12


def decode_milliseconds(model, window, change) -> float:
    """The best of a few decode steps after a window, of all layers."""
    with compressed():
        caches = changed_caches(model, change)
        mx.eval(model(mx.array(window)[None], cache=caches), [c.state for c in caches])
        times = []
        for token in window[:REPEATS]:
            start = time.perf_counter()
            mx.eval(model(mx.array([[int(token)]]), cache=caches))
            times.append(time.perf_counter() - start)
    return 1e3 * min(times)


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
    for name, d in measure(model, windows, args.chunk, ARMS).items():
        change = d.perplexity / d.exact_perplexity - 1
        print(
            f"{name:17} {d.kl:8.1e} {d.top1:7.2%} {change:+8.2%} "
            f"{decode_milliseconds(model, windows[0], ARMS[name]):10.2f} "
            f"{fixed_bytes(model, ARMS[name]):12,}"
        )


if __name__ == "__main__":
    main()

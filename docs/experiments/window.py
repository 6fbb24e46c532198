"""How many tokens should stay in full precision: the newest (window) and the first (sinks).

Run it as

    python docs/experiments/window.py --model PATH --tokens FILE
"""

import mlx.core as mx
from common import load

from mlx_turboquant_plugin.tools.arms import EXACT, Arm, Run
from mlx_turboquant_plugin.tools.memory import bf16_bytes, bytes_by_length, layer_shapes
from mlx_turboquant_plugin.tools.teacher_forcing import join, lockstep

CHOICES = [(32, 4), (64, 4), (128, 4), (192, 4), (256, 4), (384, 4), (192, 0), (192, 32)]
LENGTHS = [2048, 8192, 32768]


def main():
    model, windows, args = load(__doc__)
    arms = [Arm(f"{w:>6} {s:>5}", {"window": w, "sinks": s}) for w, s in CHOICES]
    parts = []
    for window in windows:
        exact = Run(EXACT, model)
        runs = [Run(arm, model) for arm in arms]
        parts.append(lockstep(exact, runs, mx.array(window), args.chunk))
    shapes = layer_shapes(exact.caches)
    print(f"{args.model}: {args.windows} x {args.length} tokens, preset default")
    print(f"window sinks   mean KL   top-1      ppl  times smaller at {LENGTHS}")
    for arm, found in zip(arms, zip(*parts)):
        d = join(found)
        sizes = bytes_by_length(arm, model, shapes, mx.bfloat16, LENGTHS)
        ratios = [bf16_bytes(shapes, n) / size for n, size in zip(LENGTHS, sizes)]
        print(
            f"{arm.name} {d.kl:9.2e} {d.top1:7.2%} {d.perplexity / d.exact_perplexity - 1:+8.2%}  "
            + "  ".join(f"{ratio:.2f}" for ratio in ratios)
        )


if __name__ == "__main__":
    main()

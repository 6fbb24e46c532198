"""Is anything better than one Lloyd-Max code per channel, at the same bytes?

Keys and values go through quantizers simulated in NumPy instead of the shipped one;
everything around them (rotation, balance, bias, window, scale search) stays as it is.

    python docs/experiments/quantizers.py --model PATH --tokens FILE
"""

import functools
import math
from statistics import NormalDist

import mlx.core as mx
import numpy as np
from common import load, measure

from mlx_turboquant_plugin.codecs.exact import Exact
from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.codecs.lloyd_max import ALONG, LOWEST_OCTAVE, SEARCH, STEPS_PER_OCTAVE

KEY_BITS, VALUE_BITS = 4, 3
SAMPLES = np.random.default_rng(7).standard_normal(200_000)


@functools.cache
def lloyd_max_levels(count: int) -> np.ndarray:
    """The levels of the best scalar quantizer of N(0, 1)."""
    quantiles = (np.arange(count) + 0.5) / count
    levels = np.array([NormalDist(0, math.sqrt(3)).inv_cdf(q) for q in quantiles])
    x = np.sort(SAMPLES)
    for _ in range(300):
        edges = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        levels = np.array([part.mean() for part in np.split(x, edges)])
    return (levels - levels[::-1]) / 2


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def lloyd_max(bits: int):
    levels = lloyd_max_levels(2**bits)
    return lambda z: nearest(z, levels)


# The 8-state trellis of Ungerboeck's amplitude modulation code; from state s the branch
# b leads to (2 s + b) mod 8 and uses one of the four subsets of levels.
SUBSET = np.array([[0, 2], [1, 3], [2, 0], [3, 1], [2, 0], [3, 1], [0, 2], [1, 3]])


def viterbi(z: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of each level on the cheapest path through the trellis: (N, D) to (N, D)."""
    choices = []
    for subset in range(4):
        own = levels[subset::4]
        choices.append(4 * np.searchsorted((own[1:] + own[:-1]) / 2, z) + subset)
    index = np.stack(choices, -1)
    cost = (levels[index] - z[..., None]) ** 2
    count, dim = z.shape
    path = np.full((count, 8), np.inf)
    path[:, 0] = 0
    came = np.empty((dim, count, 8), np.int8)
    state = np.arange(8)
    for t in range(dim):
        options = []
        for high in (0, 4):
            before = (state >> 1) + high
            options.append(path[:, before] + cost[:, t, SUBSET[before, state & 1]])
        came[t] = options[1] < options[0]
        path = np.minimum(*options)
    at = path.argmin(axis=1)
    out, rows = np.empty((count, dim), np.int64), np.arange(count)
    for t in range(dim - 1, -1, -1):
        before = (at >> 1) + 4 * came[t, rows, at]
        out[:, t] = index[rows, t, SUBSET[before, at & 1]]
        at = before
    return out


@functools.cache
def trellis_levels(bits: int) -> np.ndarray:
    """Levels trained on N(0, 1) (Marcellin and Fischer, IEEE Trans. Comm. 38, 1990)."""
    levels = lloyd_max_levels(2 ** (bits + 1)).copy()
    x = SAMPLES[: 128 * 800].reshape(-1, 128)
    for _ in range(12):
        index = viterbi(x, levels)
        sums = np.bincount(index.ravel(), x.ravel(), len(levels))
        counts = np.bincount(index.ravel(), minlength=len(levels))
        levels = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), levels))
    return levels


def trellis(bits: int):
    levels = trellis_levels(bits)
    return lambda z: levels[viterbi(z, levels)]


def nearest_e8(x: np.ndarray) -> np.ndarray:
    """The nearest point of E8 = D8 + {0, 1/2}^8 (Conway and Sloane, 1982)."""
    found = []
    for shift in (0.0, 0.5):
        y = x - shift
        r = np.rint(y)
        odd = r.sum(axis=-1) % 2 != 0
        worst = np.abs(y - r).argmax(axis=-1)
        i = np.arange(len(x))
        flip = np.where(y[i, worst] > r[i, worst], 1.0, -1.0)
        r[i[odd], worst[odd]] += flip[odd]
        found.append(r + shift)
    closer = ((x - found[0]) ** 2).sum(-1) <= ((x - found[1]) ** 2).sum(-1)
    return np.where(closer[:, None], *found)


@functools.cache
def e8_unit(bits: int) -> float:
    """Lattice units per standard deviation with the least error for N(0, 1)."""
    x = SAMPLES[:80_000].reshape(-1, 8)
    units = np.linspace(0.5, 1.1, 25) * 2 ** (bits - 2)
    return float(min(units, key=lambda unit: ((in_ball(x * unit, bits) / unit - x) ** 2).mean()))


def in_ball(x: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of the 2^(8 bits) points of E8 around the origin, nearly."""
    radius = (2.0 ** (8 * bits) * 24 / math.pi**4) ** 0.125
    x = x * np.minimum(1, radius / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9))
    y = nearest_e8(x)
    for _ in range(20):
        out = np.linalg.norm(y, axis=-1) > radius
        if not out.any():
            break
        x = np.where(out[:, None], x * 0.98, x)
        y = nearest_e8(x)
    return y


def e8(bits: int):
    unit = e8_unit(bits)
    return lambda z: (in_ball(z.reshape(-1, 8) * unit, bits) / unit).reshape(z.shape)


class Entropy:
    """A uniform quantizer whose codes cost what an ideal entropy coder for N(0, 1) needs."""

    def __init__(self, bits: int):
        # Entropy of the codes = differential entropy of N(0, 1) - log2(step), nearly.
        self.step = 2 ** (0.5 * math.log2(2 * math.pi * math.e) - bits)
        self.spent, self.count = 0.0, 0
        edges = (np.arange(-200, 202) - 0.5) * self.step
        cdf = np.array([NormalDist().cdf(e) for e in edges])
        self.cost = -np.log2(np.maximum(np.diff(cdf), 1e-12))

    def __call__(self, z):
        code = np.clip(np.rint(z / self.step), -200, 200).astype(int)
        self.spent += self.cost[code + 200].sum()
        self.count += z.size
        return code * self.step


def searched(quantize, x: np.ndarray) -> np.ndarray:
    """What is left of vectors (N, D) with the scale search of the shipped codec."""
    rms = np.maximum(np.sqrt((x * x).mean(-1, keepdims=True)), 1e-20)
    start = np.rint((np.log2(rms) - LOWEST_OCTAVE) * STEPS_PER_OCTAVE)
    best = best_error = None
    for step in SEARCH:
        size = 2.0 ** ((start + step) / STEPS_PER_OCTAVE + LOWEST_OCTAVE)
        y = quantize(x / size) * size
        missing = x - y
        along = (missing * x).sum(-1, keepdims=True) / (rms * math.sqrt(x.shape[-1]))
        error = (missing**2).sum(-1, keepdims=True) + ALONG * along**2
        if best is None:
            best, best_error = y, error
        else:
            better = error < best_error
            best, best_error = np.where(better, y, best), np.where(better, error, best_error)
    return best


class Simulated(Exact):
    """A quantizer that keeps what ``restore`` (B, H, T, D) leaves of vectors."""

    def __init__(self, restore):
        object.__setattr__(self, "restore", restore)

    def encode(self, x):
        return (mx.array(self.restore(np.array(x, dtype=np.float64)).astype(np.float32)),)


def per_vector(quantize):
    return lambda x: searched(quantize, x.reshape(-1, x.shape[-1])).reshape(x.shape)


def centred(restore):
    """Take the mean over the block of tokens from each channel, in fp16."""

    def apply(x):
        mean = x.mean(axis=2, keepdims=True).astype(np.float16).astype(np.float64)
        return restore(x - mean) + mean

    return apply


def variance_normalized(restore):
    """Equal variances along both axes of a block of tokens (after KVarN, arXiv 2606.03458)."""

    def apply(x):
        channel = np.ones((*x.shape[:2], 1, x.shape[-1]))
        for _ in range(4):
            y = x / channel
            y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-20)
            channel = channel * np.sqrt((y * y).mean(axis=2, keepdims=True) + 1e-20)
        # Eight bits each, as the scales of vectors.
        channel = 2 ** (np.rint(np.log2(channel) * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE)
        return restore(x / channel) * channel

    return apply


def simulated(keys, values):
    def change(index, codec):
        spec = codec.spec._replace(key_codec="exact", value_codec="exact")
        other = KVCodec(spec, codec.balance, codec.bias)
        other.keys, other.values = Simulated(keys), Simulated(values)
        return other

    return change


def main():
    model, windows, args = load(__doc__)
    k, v = KEY_BITS, VALUE_BITS
    entropy = Entropy(k), Entropy(v)
    plain = per_vector(lloyd_max(k)), per_vector(lloyd_max(v))
    arms = {
        "shipped": lambda index, codec: codec,
        "Lloyd-Max, simulated": simulated(*plain),
        "trellis, 8 states": simulated(per_vector(trellis(k)), per_vector(trellis(v))),
        "E8 in a ball": simulated(per_vector(e8(k)), per_vector(e8(v))),
        "entropy coded": simulated(*map(per_vector, entropy)),
        "variance normalized": simulated(*map(variance_normalized, plain)),
        "centred keys": simulated(centred(plain[0]), plain[1]),
    }
    gauss = SAMPLES[:102_400].reshape(-1, 128)
    mse = {
        name: [float(((q(b)(gauss) - gauss) ** 2).mean()) for b in (k, v)]
        for name, q in (
            ("Lloyd-Max, simulated", lloyd_max),
            ("trellis, 8 states", trellis),
            ("E8 in a ball", e8),
            ("entropy coded", Entropy),
        )
    }
    for one in entropy:
        one.spent, one.count = 0.0, 0
    print(f"{args.model}: {args.windows} x {args.length} tokens, keys {k} and values {v} bits")
    found = measure(model, windows, args.chunk, arms)
    base = found["shipped"].kl
    print(f"{'':21} {'mean KL':>8} {'/ shipped':>9} {'top-1':>7}  mean squared error for N(0, 1)")
    for name, d in found.items():
        errors = ", ".join(f"{e:.5f}" for e in mse.get(name, []))
        print(f"{name:21} {d.kl:8.2e} {d.kl / base:9.2f} {d.top1:7.2%}  {errors}")
    spent = [one.spent / one.count for one in entropy]
    print(f"entropy coded: {spent[0]:.3f} and {spent[1]:.3f} bits a number")


if __name__ == "__main__":
    main()

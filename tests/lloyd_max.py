"""Finds the codebooks of ``mlx_turboquant_plugin.codecs.lloyd_max``: python tests/lloyd_max.py

The best levels for N(0, 1) are scaled to half-integers between -127.5 and 127.5 and
replaced by a curve of whole numbers that comes close to them. Among the curves with all
steps in 16 bits the one with the least mean squared error is taken. Many curves make the
same levels, so a printed one need not be the one in use.

Symmetric quantizers are written as their positive levels, ascending.
"""

import itertools
import math

import numpy as np


def levels(bits):
    """The levels of the best quantizer (Lloyd 1957, Max 1960), by Lloyd's iteration."""
    found = np.arange(0.5, 2 ** (bits - 1)) * 6 / 2**bits
    while True:
        probability, moment = _cells(found)
        better = moment / probability
        if np.abs(better - found).max() < 1e-13:
            return better
        found = better


def distortion(levels):
    """Mean squared error of the nearest level for N(0, 1)."""
    probability, moment = _cells(levels)
    return 1 + 2 * float(np.sum(probability * np.square(levels) - 2 * moment * levels))


def _cells(levels):
    """Integrals of the density, and of x times it, where each level is the nearest one."""
    levels = np.asarray(levels, float)
    edges = [0.0, *(levels[1:] + levels[:-1]) / 2, math.inf]
    tails = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in edges])
    density = np.array([math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in edges])
    return tails[:-1] - tails[1:], density[:-1] - density[1:]


def curve_levels(bits, a, d, shift, b):
    """Levels (u (b + (j (a j + d) >> shift)) >> 8) + 1/2 for u = 1, 3, 5, ..., j = (u^2 - 1) / 8.

    None where a step does not fit 16 bits, or where -u would not get the negative level.
    """
    u = np.arange(1, 2**bits, 2)
    j = u * u >> 3
    inner = j * (a * j + d)
    product = u * (b + (inner >> shift))
    whole = np.abs([inner, product]).max() < 2**15 and (product > 0).all()
    return (product >> 8) + 0.5 if whole and (product % 256).all() else None


def best_unit(curve, target):
    """What to divide ``curve`` by, by golden-section search; it is close to ``target``."""
    near = float(curve @ target / (target @ target))
    low, high = 0.95 * near, 1.05 * near
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if distortion(curve / left) < distortion(curve / right):
            high = right
        else:
            low = left
    return (low + high) / 2


def curves(bits, target):
    """Coefficients (a, d, shift, b) near least-squares curves through multiples of ``target``."""
    u = np.arange(1, 2**bits, 2)
    j = u * u >> 3
    probability, _ = _cells(target)
    weight = np.sqrt(probability) * u
    # Two levels are no reason for a quadratic term.
    degrees = (0, 1) if len(u) == 2 else (0, 1, 2)
    powers = np.stack([j**degree for degree in degrees], axis=1)
    for top in np.arange(118, 127.5, 0.5):
        wanted = target * top / target[-1] * 256 / u
        fit = np.linalg.lstsq(powers * weight[:, None], wanted * weight, rcond=None)[0]
        b, d, a = (*fit, 0.0)[:3]
        for shift in (0,) if a == 0 else range(2, 7):
            yield from itertools.product(
                _near(a * 2**shift, 1 if a else 0), _near(d * 2**shift, 3), (shift,), _near(b, 12)
            )


def _near(x, distance):
    return range(round(x) - distance, round(x) + distance + 1)


def find(bits):
    """(levels in halves, unit, a curve through them) with the least distortion."""
    target = levels(bits)
    probability, _ = _cells(target)
    found = {}
    for curve in curves(bits, target):
        made = curve_levels(bits, *curve)
        if made is not None:
            found.setdefault(tuple(made.tolist()), curve)

    def rough(made):
        # The unit that is best if no number changed its cell.
        made = np.array(made)
        unit = (probability * made) @ made / ((probability * made) @ target)
        return distortion(made / unit)

    best = min(found, key=rough)
    return best, best_unit(np.array(best), target), found[best]


if __name__ == "__main__":
    for bits in (2, 3, 4):
        made, unit, curve = find(bits)
        error, least = distortion(np.array(made) / unit), distortion(levels(bits))
        print(f"{bits} bits: levels {made}, unit {unit:.4f}, curve {curve}")
        print(f"  mean squared error {error:.6f}, {error / least - 1:.3%} above {least:.6f}")

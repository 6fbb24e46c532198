"""How to weigh a key's channels and their errors, from the model's statistics or its weights.

After the rotation a key's quantization error is spread evenly over its channels,
but the query does not weigh them evenly. With keys divided by s and queries
multiplied by it, the error of a score is about sum_c (q_c s_c)^2 sum_c (k_c / s_c)^2,
which is least (Cauchy-Schwarz) where s_c^2 = rms(k_c) / rms(q_c).

Where errors are fed back (codecs/feedback.py), they are not spread evenly over the channels but
kept small where queries are large, and keys that are all of one size, s_c = rms(k_c), lose less:
at high rates the best transform is the one that makes them so, whatever the queries are. At a
few bits the best is between the two.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..codecs.segmented import ERRORS, FIRST_BITS
from .projections import Projection

# Where errors are fed back, how far log s is on the way to that of the keys' own sizes.
WHITENED = 0.25

# Of a matrix, to be looked at at once.
ROWS = 256


def projection_rms(
    projection: Projection, norm: nn.Module, heads: int, biased: bool = False
) -> mx.array:
    """Root mean square of each output channel of a projection: fp32 (heads, D).

    Args:
        norm: what makes the projection's input a vector of unit mean square times the
            norm's weight.
        biased: whether the bias counts: that of queries does, that of keys is kept out
            of the codes.
    """
    squares = []
    for first in range(0, projection.outputs, ROWS):
        weight = projection.weight(slice(first, first + ROWS))
        squares.append(mx.sum((weight * norm_rms(norm, 1, weight.shape[1])) ** 2, axis=-1))
        # One after the other, or there would be a second copy of the weights.
        mx.eval(squares[-1])
    square = mx.concatenate(squares)
    bias = projection.bias()
    if biased and bias is not None:
        square = square + bias.astype(mx.float32) ** 2
    return mx.sqrt(square).reshape(heads, -1)


def norm_rms(norm: nn.Module, heads: int, dim: int) -> mx.array:
    """The same for heads that a norm has made: |weight| of the norm, fp32 (heads, D).

    Norms keep their weights as they like (Gemma's as the difference to 1), one vector
    for every head or one for all of them: look at what the norm makes of ones.
    """
    signs = mx.where(mx.arange(heads * dim) % 2 == 0, 1.0, -1.0)
    flat = heads > 1 and getattr(norm, "weight", signs[:1]).shape == signs.shape
    made = norm(signs if flat else signs.reshape(heads, dim))
    return mx.abs(made.astype(mx.float32)).reshape(heads, dim)


def balance(key_rms: mx.array, query_rms: mx.array, rope: Any, whitened: float = 0.0) -> mx.array:
    """The factors s of a layer.

    Args:
        key_rms: root mean squares of what is quantized of keys, (H, D).
        query_rms: those of queries, (H_q, D).
        rope: the rope object; s is equal within each of its pairs, so that it
            commutes with the rotation by position.
        whitened: how far log s is on the way to that of the keys' own sizes.

    Returns:
        fp32 (H, 1, D) with geometric mean 1.
    """
    keys, queries = map(_floored, _squares(key_rms, query_rms, rope))
    log_s = (1 - whitened) * mx.log(keys / queries) / 4 + whitened * mx.log(keys) / 2
    return mx.exp(log_s - mx.mean(log_s, axis=-1, keepdims=True))[:, None]


def layout(key_rms: mx.array, query_rms: mx.array, rope: Any) -> mx.array:
    """How the keys of each KV head are cut in two segments, see :attr:`KVCodec.layout`.

    With balanced keys the noise of a score is about the sum of sqrt(q_c^2 k_c^2) times the
    noise of a channel's code, for unit mean square. Channels are sorted by that, the dearest
    first; a rotated segment's is what the mean of its channels makes, and the bits are those
    with which that of both is least.

    Args:
        As of :func:`balance`.

    Returns:
        int32 (H, D + 1).
    """
    keys, queries = map(_floored, _squares(key_rms, query_rms, rope))
    cost = np.sqrt(np.array(keys * queries))
    order = np.argsort(-cost, axis=-1, kind="stable")
    halves = np.split(np.take_along_axis(cost, order, axis=-1), 2, axis=-1)
    first, second = (np.mean(half, axis=-1) ** 2 for half in halves)
    noise = [first * ERRORS[bits] + second * ERRORS[8 - bits] for bits in FIRST_BITS]
    bits = np.array(FIRST_BITS)[np.argmin(noise, axis=0)]
    return mx.array(np.concatenate([order, bits[:, None]], axis=-1).astype(np.int32))


def query_squares(key_rms: mx.array, query_rms: mx.array, rope: Any) -> mx.array:
    """Mean squares of the queries of each KV head, pooled over pairs: fp32 (H, D).

    Args:
        As of :func:`balance`.
    """
    return _floored(_squares(key_rms, query_rms, rope)[1])


def _floored(square: mx.array) -> mx.array:
    """Mean squares (H, D), none far below the others: what was silent may be heard later."""
    return mx.maximum(square, 1e-5 * mx.mean(square, axis=-1, keepdims=True) + 1e-20)


def _squares(key_rms: mx.array, query_rms: mx.array, rope: Any) -> tuple[mx.array, mx.array]:
    """Mean squares of keys, and of the queries of each KV head, (H, D), pooled over pairs."""
    heads, dim = key_rms.shape
    queries = (query_rms**2).reshape(heads, -1, dim).mean(axis=1)
    return _pooled(key_rms**2, rope), _pooled(queries, rope)


def _pooled(square: mx.array, rope: Any) -> mx.array:
    """Means of ``square`` (H, D) over the rotary pairs."""
    dim = square.shape[-1]
    rotated = getattr(rope, "dims", getattr(rope, "dim", dim)) if rope is not None else dim
    turned, rest = square[:, :rotated], square[:, rotated:]
    traditional = getattr(rope, "traditional", False)
    shape = (-1, rotated // 2, 2) if traditional else (-1, 2, rotated // 2)
    pairs = turned.reshape(shape)
    pooled = mx.mean(pairs, axis=2 if traditional else 1, keepdims=True)
    pooled = mx.broadcast_to(pooled, pairs.shape).reshape(turned.shape)
    return mx.concatenate([pooled, rest], axis=-1)

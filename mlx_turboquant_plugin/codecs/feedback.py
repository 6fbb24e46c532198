"""Rounding that makes up for what it has lost: error feedback for keys.

An error e of a rotated segment changes scores by sum_c w_c (e R^T)_c^2 = e C e^T in the mean, with
w_c the mean squares of the queries that meet its channels. With C = U D U^T, D block diagonal and
U upper triangular but for ones, u = e U are the errors of rounding if, before a block of channels
is rounded, u (U^-1 - 1) is added, which takes what those before it lost; and they cost u D u^T,
the least. This is LDLQ (arXiv 2307.13304, section 3) in the form of GPTQ (arXiv 2210.17323), with
queries in the place of a layer's inputs. It takes no bits, and who reads the codes need not know.
"""

import mlx.core as mx
import numpy as np

from .key_bias import SETUP
from .rotation import Rotation

# Channels that are rounded at once. One at a time would lose 1% less, and take four times the
# operations.
FEEDBACK_BLOCK = 4


def feedback(
    query_squares: mx.array,
    balance: mx.array | None,
    layout: mx.array,
    rotation: Rotation,
) -> mx.array:
    """What errors of rotated channels (rows) are multiplied by for those after them (columns).

    Args:
        query_squares: mean squares of the queries of each KV head, (H, D).
        balance, layout: see :class:`KVCodec`.
        rotation: that of the segments.

    Returns:
        fp16 (H, 2, D / 2, D / 2), zeros but in columns of later blocks than the row's.
    """
    weights = np.array(query_squares, np.float64)
    if balance is not None:
        weights = weights * np.array(balance, np.float64)[:, 0] ** 2
    weights = np.take_along_axis(weights, np.array(layout)[:, :-1], axis=-1)
    heads, dim = weights.shape
    width = dim // 2
    with mx.stream(SETUP):
        turn = np.array(Rotation.forward(mx.eye(width), rotation.array), np.float64)
    cost = turn.T @ (weights.reshape(heads, 2, width, 1) * turn)
    # U D^(1/2), by Cholesky's factor of what is reversed.
    upper = np.linalg.cholesky(cost[..., ::-1, ::-1])[..., ::-1, ::-1]
    block = np.arange(width) // FEEDBACK_BLOCK
    inverse = np.where(block[:, None] == block, upper, 0) @ np.linalg.inv(upper)
    return mx.array((inverse * (block[:, None] < block)).astype(np.float16))

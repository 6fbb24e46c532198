"""Layers of a prompt's pass that are under way at the same time."""

import threading
from collections import deque

import mlx.core as mx

# Work is handed to the device whenever so many bytes of keys, values and results have come up:
# that of a layer of a large model, or of several of a small one.
SHARE = 2**25
# More shares under way keep no device busier.
MOST = 4


class _Pace(threading.local):
    def __init__(self):
        self.first: object = None
        # No pass has begun.
        self.start, self.bytes = -1, 0
        self.under_way: deque[mx.array] = deque()


_pace = _Pace()


def paced(out: mx.array, nbytes: int, start: int, layer: object) -> mx.array:
    """Have the device start before the whole pass is described, and wait if it is far behind.

    MLX describes a pass to the end and then runs ahead of the device, with memory for many
    layers in use at once: with a long context as much as the uncompressed cache.

    Args:
        out: what a layer's attention gives; it is returned.
        nbytes: of keys and values made for it.
        start, layer: the position of the pass, and what tells its layers apart: each pass
            has the same shares as the last like it, for which MLX keeps graphs on NVIDIA GPUs.
    """
    if start != _pace.start or layer is _pace.first:
        _pace.start, _pace.first, _pace.bytes = start, layer, 0
    _pace.bytes += out.nbytes + nbytes
    if _pace.bytes < SHARE:
        return out
    # One number says when it is done, and holds no memory after that.
    done = mx.contiguous(out[:1, :1, :1, :1])
    try:
        mx.async_eval(out, done)
    except ValueError:
        # Inside of a function transformation nothing can be evaluated.
        return out
    _pace.bytes = 0
    _pace.under_way.append(done)
    if len(_pace.under_way) > MOST:
        mx.eval(_pace.under_way.popleft())
    return out

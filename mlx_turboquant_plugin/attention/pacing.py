"""Layers of a prompt's pass that are under way at the same time."""

import threading
from collections import deque

import mlx.core as mx

# More keep no device busier.
MOST = 4

_under_way = threading.local()


def paced(out: mx.array) -> mx.array:
    """Start the work for ``out``, and wait if that for many others has not been done.

    MLX describes a whole pass before a device begins, and memory for many layers is in use at
    once then: with a long context that is as much as the uncompressed cache.

    Args:
        out: what a layer's attention gives; it is returned.
    """
    # One number says when it is done, and holds no memory after that.
    done = mx.contiguous(out[:1, :1, :1, :1])
    try:
        mx.async_eval(out, done)
    except ValueError:
        # Inside of a function transformation nothing can be evaluated.
        return out
    waiting = _under_way.__dict__.setdefault("waiting", deque())
    waiting.append(done)
    if len(waiting) > MOST:
        mx.eval(waiting.popleft())
    return out

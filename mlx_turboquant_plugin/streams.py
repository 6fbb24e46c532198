"""Streams that share the work of one step.

MLX runs each stream of the CPU on a thread of its own, and a step of decoding on one stream.
"""

import functools
import os

import mlx.core as mx

# More are not measured, and each has to be waited for.
MOST = 4


@functools.cache
def helpers() -> tuple[mx.ThreadLocalStream, ...]:
    """The streams besides the current one that can work at the same time, on the CPU.

    Each thread of Python that enters one gets a stream of its own, as it has its own
    default stream: arrays that are not evaluated must not go from one to another. MLX ends
    none of the threads behind streams (0.32.4), so that a program that starts a thread for each
    request has one more for each of them.
    """
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(min(_cores(), MOST) - 1))


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

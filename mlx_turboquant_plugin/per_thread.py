"""What must not be shared by threads: arrays that are not evaluated, and traces."""

import functools
import threading
from collections.abc import Callable, Iterable

import mlx.core as mx


def release(arrays: Iterable[mx.array]) -> None:
    """Have ``arrays`` evaluated, so that any thread can go on with them. Does not wait."""
    mx.async_eval(list(arrays))


def cached_per_thread(maxsize: int) -> Callable:
    """``functools.lru_cache``, one for each thread, which ends with it.

    An array that is not evaluated belongs to the thread that made it, and the number of a
    thread that has ended may be given to another one.
    """

    def decorate(function: Callable) -> Callable:
        local = threading.local()

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                cached = local.cached
            except AttributeError:
                cached = local.cached = functools.lru_cache(maxsize)(function)
            return cached(*args, **kwargs)

        call.cache_clear = lambda: local.__dict__.clear()  # type: ignore[attr-defined]
        return call

    return decorate

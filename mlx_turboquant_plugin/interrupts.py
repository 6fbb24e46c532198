"""Ctrl-C and SIGTERM end a command alike, and neither loses what was measured."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a command ends as after Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` meanwhile, unless this process ignores or handles it."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with _handled(stop, *[signal.SIGTERM] * free):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM does nothing meanwhile: for writing results down.

    A second one ends it: what a pipe that nobody reads is given would never be written.
    """
    came: list[int] = []

    def wait(number: int, frame: Any) -> None:
        if came:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        came.append(number)

    with _handled(wait, signal.SIGINT, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Let ``handler`` have these signals, but for those that this process ignores.

    In the main thread, which alone gets any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, handler)) for number in heard]
    try:
        yield
    finally:
        for number, old in before:
            signal.signal(number, old)

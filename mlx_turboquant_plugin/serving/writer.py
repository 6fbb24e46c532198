"""A thread that writes one thing after the other, and says how much is left."""

import queue
import threading
from collections.abc import Callable

from ..log import log_once

# A disk that is slower than the caches come is given no more of them.
MOST = 8


class Writer:
    """Runs writes in a thread of its own.

    Attributes:
        pending: the bytes of what is not written yet.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._written = threading.Condition()
        self._queue: queue.Queue[tuple[int, Callable[[], None]]] = queue.Queue()
        # It ends with the process: what is written by halves is removed by the next one.
        threading.Thread(target=self._run, name="turboquant-disk-cache", daemon=True).start()

    def put(self, nbytes: int, write: Callable[[], None]) -> None:
        """Have ``write`` called, unless too many are waiting."""
        if self._queue.qsize() < MOST:
            with self._written:
                self.pending += nbytes
            self._queue.put((nbytes, write))

    def wait_until(self, done: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until ``done()`` or until nothing is pending, at most ``timeout`` seconds."""
        with self._written:
            self._written.wait_for(lambda: done() or not self.pending, timeout)

    def _run(self) -> None:
        while True:
            nbytes, write = self._queue.get()
            try:
                write()
            except Exception as error:  # A full or a read-only disk costs what it would save.
                log_once("a prompt cache is not kept on disk: %s", str(error))
            # Its caches are to be gone before others take their room.
            del write
            with self._written:
                self.pending -= nbytes
                self._written.notify_all()

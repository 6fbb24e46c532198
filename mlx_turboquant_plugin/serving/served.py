"""What one server has that the hooks and its page of metrics need."""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm.generate import BatchGenerator

from ..log import logger
from .admission import Admission
from .counts import Counts
from .prompt_store import PromptStore
from .sizes import uncompressed_nbytes

KEPT, RUNNING = "kept", "running"
# For a long chunk of a prompt, a page of metrics waits no longer: then it shows what was before.
PATIENCE = 2.0


class Served:
    """A server's prompt cache, its admission (None without a budget) and what was counted.

    Attributes:
        nbytes: the bytes of the caches that are kept and of those that run, as they are and as
            they would be uncompressed.
    """

    def __init__(self, store: PromptStore, admission: Admission | None, counts: Counts):
        self.store, self.admission, self.counts = store, admission, counts
        self.nbytes = {KEPT: (0, 0), RUNNING: (0, 0)}
        self._generator: Callable[[], BatchGenerator | None] = lambda: None
        self._asked, self._answered = threading.Event(), threading.Event()

    def generates_with(self, generator: BatchGenerator) -> BatchGenerator:
        """Note what generates from now on, and return it."""
        self._generator = weakref.ref(generator)
        return generator

    def ask(self) -> None:
        """Have the thread that generates refresh :attr:`nbytes`, since only it can count."""
        self._answered.clear()
        self._asked.set()
        self._answered.wait(PATIENCE)

    def answer(self) -> None:
        """Called by that thread between its steps."""
        if self._asked.is_set():
            self._asked.clear()
            try:
                self._count()
            except Exception:
                # It must go on generating, whatever caches other packages have.
                logger.exception("the bytes of the KV cache can't be counted for /metrics")
            self._answered.set()

    def _count(self) -> None:
        kept = [cache for entry in self.store.entries() for cache in entry.prompt_cache]
        for name, caches in (KEPT, kept), (RUNNING, list(self._running())):
            held = sum(cache.nbytes for cache in caches)
            self.nbytes[name] = held, uncompressed_nbytes(caches)

    def _running(self) -> Iterator[Any]:
        generator: Any = self._generator()
        if generator is None:
            return
        for sequence in generator._unprocessed_sequences:
            yield from sequence[3]
        for batch in (generator._prompt_batch, generator._generation_batch):
            yield from batch.prompt_cache


_here = threading.local()


def enter(served: Served) -> None:
    """Note that this thread generates for ``served``."""
    _here.served = served


def leave() -> None:
    """Undo :func:`enter`."""
    _here.__dict__.clear()


def current() -> Served | None:
    """What the thread that is running generates for, or None."""
    return getattr(_here, "served", None)

"""Standard output, as the commands write to it."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Unwritable(Exception):
    """Standard output can't be written; the message says why and what to do."""


class Output:
    """Stands in for ``sys.stdout``: its failures are told from those of other files.

    Attributes:
        used: whether anything was written.
    """

    def __init__(self, stream: Any):
        """Write to ``stream``, as ``sys.stdout`` is: None where it is closed."""
        if isinstance(stream, io.TextIOWrapper):
            # Who reads a pipe sees each line at once, and a closed one is found by the command.
            stream.reconfigure(line_buffering=True)
        self._stream, self.used = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``; raises Unwritable, or BrokenPipeError if nobody reads it any more."""
        self.used = True
        with _named():
            return self._stream.write(text)

    def flush(self) -> None:
        """Write what is still held back; raises what :meth:`write` does."""
        if self._stream is None:
            raise Unwritable("standard output is closed: redirect it to a file or to /dev/null")
        with _named():
            self._stream.flush()

    def give_up(self) -> None:
        """Write to nowhere from now on: Python flushes it once more in the end."""
        if self._stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(
            f"standard output can't be written ({error.strerror}): redirect it to another place"
        ) from error

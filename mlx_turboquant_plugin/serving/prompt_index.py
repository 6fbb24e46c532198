"""Which of a model's prompt caches on disk begins as a prompt does.

mlx-lm's PromptTrie would do, at a dictionary for each token: 180 MB for 100 files of 8000 tokens,
where their tokens take 3. There are as many files as fit on the disk, a few hundred, and all of
them are compared with a prompt.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .disk_files import Entry

# Of the tokens of a file, a prompt must share so many that reading it is worth while.
WORTH = 1 / 8

Tokens = Sequence[int] | np.ndarray


class Found(NamedTuple):
    """A file of ``length`` tokens, the first ``common`` of which a prompt begins with."""

    entry: Entry
    length: int
    common: int


class PromptIndex:
    """The files of one model.

    Args:
        files: the tokens and the entry of each.
    """

    def __init__(self, files: Iterable[tuple[Tokens, Entry]]):
        self._files: dict[Path, tuple[np.ndarray, Entry]] = {}
        for tokens, entry in files:
            self.add(tokens, entry)

    def add(self, tokens: Tokens, entry: Entry) -> None:
        """Note a file."""
        self._files[entry.path] = np.asarray(tokens, np.int32), entry

    def drop(self, path: Path) -> None:
        """Forget a file, if it is known."""
        self._files.pop(path, None)

    def longest(self, tokens: Sequence[int], known: int) -> Found | None:
        """The file worth reading that begins with most of ``tokens`` but the last one.

        Args:
            known: how many of the tokens are there without.
        """
        best = None
        for found in self._common(tokens):
            found = found._replace(common=min(found.common, len(tokens) - 1))
            fits = found.entry.trimmable or found.length == found.common
            worth = found.common - known >= WORTH * found.length
            if fits and worth and (best is None or found.common > best.common):
                best = found
        return best

    def beginnings(self, tokens: Sequence[int]) -> list[Found]:
        """The files whose tokens ``tokens`` begins with, or is."""
        return [found for found in self._common(tokens) if found.common == found.length]

    def _common(self, tokens: Sequence[int]) -> Iterable[Found]:
        prompt = np.array(tokens, np.int32)
        for held, entry in self._files.values():
            size = min(held.size, prompt.size)
            differs = held[:size] != prompt[:size]
            yield Found(entry, held.size, int(differs.argmax()) if differs.any() else size)

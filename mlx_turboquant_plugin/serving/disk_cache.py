"""Prompt caches on disk: what memory has no room for, found again by the beginning of a prompt.

A folder for each model with its settings holds one file of mlx-lm's ``save_prompt_cache`` for
each prompt cache. Files are written aside, then renamed; their names end with a checksum. One
that is damaged or not of this model and version is left unread.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..cache.parts import only_compressed, parts_of
from . import disk_files
from .counts import Counts
from .prompt_index import PromptIndex
from .writer import Writer

SIZE = 10 * 10**9


class DiskCache:
    """The prompt caches of a folder.

    Args:
        folder: where they are; made when the first is written.
        size: the most bytes that all files take.
        name_of: from what the server calls a model to the folder's name, see
            :mod:`model_name`; None if it is not known.
        counts: where written files are counted.
    """

    def __init__(
        self, folder: Path, size: int, name_of: Callable[[Any], str | None], counts: Counts
    ):
        self.folder, self._size, self._name_of, self._counts = folder, size, name_of, counts
        self._indexes: dict[str, PromptIndex] = {}
        # They are the generation's and the writer's.
        self._lock = threading.Lock()
        self._writer = Writer()
        disk_files.remove_leftovers(folder)

    @property
    def pending(self) -> int:
        """The bytes of the caches that are not written yet, and so still in memory."""
        return self._writer.pending

    def wait_until(self, done: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until ``done()``, which is asked after each write."""
        self._writer.wait_until(done, timeout)

    def files(self) -> Iterator[tuple[Path, int]]:
        """All files of the folder, of any model, and their bytes, the longest unused first."""
        return disk_files.listed(self.folder)

    def fetch(
        self, model: Any, tokens: list[int], known: int, room: int | None = None
    ) -> tuple[list[Any], int] | None:
        """The caches of a beginning of ``tokens``, and its length, if that is worth reading.

        Args:
            model: what the server calls it.
            known: how many of the tokens are in memory.
            room: the most bytes that may be read, before they are cut; None for any.
        """
        name = self._name_of(model)
        while name is not None:
            with self._lock:
                found = self._index(name).longest(tokens, known)
            if found is None:
                return None
            if room is not None and found.entry.nbytes > room:
                return None
            caches = disk_files.read(found.entry.path, name)
            if caches is not None:
                if found.length > found.common:
                    trim_prompt_cache(caches, found.length - found.common)
                return caches, found.common
            self._forget(found.entry.path)
        return None

    def keep(self, model: Any, tokens: list[int], caches: list[Any], nbytes: int) -> None:
        """Have caches of ``tokens`` written, unless they are there already or hold no codes.

        Args:
            nbytes: what they take.
        """
        name = self._name_of(model)
        if name is None or nbytes > self._size or not _worth_keeping(caches, len(tokens)):
            return
        with self._lock:
            known = self._index(name).beginnings(tokens)
        if any(one.length == len(tokens) and one.entry.path.exists() for one in known):
            return
        # The writer's thread must not be given what this one has yet to compute.
        mx.eval([cache.state for cache in caches])
        self._writer.put(nbytes, lambda: self._write(name, tokens, caches, nbytes))

    def _write(self, name: str, tokens: list[int], caches: list[Any], nbytes: int) -> None:
        self._make_room(self._size - nbytes)
        trimmable = can_trim_prompt_cache(caches)
        written = disk_files.write(self.folder / name, name, tokens, caches, trimmable)
        self._make_room(self._size)
        self._counts.written += 1
        with self._lock:
            index = self._index(name)
            # As in memory: the longer one serves for its beginnings.
            replaced = [
                one.entry.path
                for one in index.beginnings(tokens)
                if trimmable or one.length == len(tokens)
            ]
            for path in replaced:
                index.drop(path)
            index.add(tokens, written)
        for path in replaced:
            if path != written.path:
                path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove files down to ``size`` bytes, and what the index has of them."""
        for path in disk_files.make_room(self.folder, size):
            self._forget(path)

    def _forget(self, path: Path) -> None:
        with self._lock:
            for index in self._indexes.values():
                index.drop(path)

    def _index(self, name: str) -> PromptIndex:
        """That of a model's files, which are looked at when it is asked for first."""
        if name not in self._indexes:
            self._indexes[name] = PromptIndex(disk_files.found(self.folder / name, name))
        return self._indexes[name]


def _worth_keeping(caches: list[Any], count: int) -> bool:
    """Neither so few tokens that none is compressed, nor others than the ``count`` expected.

    Few are processed as fast as read. After drafts mlx-lm's server may hold a token less.
    """
    if any(getattr(cache, "offset", count) != count for cache in parts_of(caches)):
        return False
    ours = only_compressed(caches)
    return not ours or any(cache.key_codes for cache in ours)

"""Prompt caches on disk: what memory has no room for, found again by the beginning of a prompt.

A folder for each model with its settings holds one file of mlx-lm's ``save_prompt_cache`` for
each prompt cache. Files are written aside, then renamed; their names end with a checksum. One
that is damaged or not of this model and version is left unread.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import PromptTrie, can_trim_prompt_cache, trim_prompt_cache

from ..cache.parts import only_compressed, parts_of
from . import disk_files
from .counts import Counts
from .writer import Writer

SIZE = 10 * 10**9
# Of the tokens of a file, a prompt must share so many that reading it is worth while.
WORTH = 1 / 8


class Found(NamedTuple):
    """A file with the tokens ``key``, the first ``common`` of which a prompt begins with."""

    entry: disk_files.Entry
    key: list[int]
    common: int


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
        self._tries: dict[str, PromptTrie] = {}
        # Of each file its model's name and tokens.
        self._keys: dict[Path, tuple[str, list[int]]] = {}
        # The index is the generation's and the writer's.
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
            found = self._longest(name, tokens, known)
            if found is None:
                return None
            if room is not None and found.entry.nbytes > room:
                return None
            caches = disk_files.read(found.entry.path, name)
            if caches is not None:
                if len(found.key) > found.common:
                    trim_prompt_cache(caches, len(found.key) - found.common)
                return caches, found.common
            self._forget(name, found.key)
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
            trie = self._trie(name)
            exact = trie.search(name, tokens).exact
            if exact is not None and trie.get(name, exact).path.exists():
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
            trie = self._trie(name)
            replaced = trie.add(name, tokens, written)
            self._keys[written.path] = name, tokens
            # As in memory: the longer one serves for its beginnings.
            shorter = trie.pop_prefixes(name, tokens) if trimmable else []
        for entry in (replaced, *(entry for _, entry in shorter)):
            if entry is not None and entry.path != written.path:
                self._keys.pop(entry.path, None)
                entry.path.unlink(missing_ok=True)

    def _longest(self, name: str, tokens: list[int], known: int) -> Found | None:
        """Of the files worth reading the one that begins with most of ``tokens`` but the last."""
        with self._lock:
            trie = self._trie(name)
            search = trie.search(name, tokens)
            counts = len(search.shorter or ()), search.common_prefix, len(tokens)
            best = None
            for key, common in zip((search.shorter, search.longer, search.exact), counts):
                if key is None:
                    continue
                entry, count = trie.get(name, key), min(common, len(tokens) - 1)
                fits = entry.trimmable or len(key) == count
                worth = count - known >= WORTH * len(key)
                if fits and worth and (best is None or count > best.common):
                    best = Found(entry, key, count)
            return best

    def _make_room(self, size: int) -> None:
        """Remove files down to ``size`` bytes, and what the index has of them."""
        for path in disk_files.make_room(self.folder, size):
            known = self._keys.pop(path, None)
            if known is not None:
                self._forget(*known)

    def _forget(self, name: str, key: list[int]) -> None:
        """Forget a file that is gone; the writer may have done so meanwhile."""
        with self._lock:
            trie = self._trie(name)
            if trie.search(name, key).exact is not None:
                trie.pop(name, key)

    def _trie(self, name: str) -> PromptTrie:
        """The index of a model's files, which are looked at when it is asked for first."""
        if name not in self._tries:
            trie = self._tries[name] = PromptTrie()
            for tokens, entry in disk_files.found(self.folder / name, name):
                trie.add(name, tokens, entry)
                self._keys[entry.path] = name, tokens
        return self._tries[name]


def _worth_keeping(caches: list[Any], count: int) -> bool:
    """Neither so few tokens that none is compressed, nor others than the ``count`` expected.

    Few are processed as fast as read. After drafts mlx-lm's server may hold a token less.
    """
    if any(getattr(cache, "offset", count) != count for cache in parts_of(caches)):
        return False
    ours = only_compressed(caches)
    return not ours or any(cache.key_codes for cache in ours)

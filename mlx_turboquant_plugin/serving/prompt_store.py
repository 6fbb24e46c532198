"""The server's prompt cache: what it evicts goes to disk, and what it keeps is counted."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    LRUPromptCache,
    PromptTrie,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from ..cache import BatchCompressedKVCache, CompressedKVCache
from ..cache.copies import shared
from ..cache.joining import alone
from ..cache.parts import rebuilt
from .counts import DISK, MEMORY, Counts
from .disk_cache import DiskCache

Tokens = list[int]


class Moved(list):
    """The prompt cache of a sequence that is leaving a batch, in arrays of the batch's."""


def moved_from(batch: list[Any], index: int) -> Moved:
    """That of one of its sequences: nothing is copied while the batch still holds it, too."""
    return Moved(rebuilt(cache, lambda part: _row(part, index)) for cache in batch)


def _row(cache: Any, index: int) -> Any:
    if isinstance(cache, BatchCompressedKVCache):
        cache.check_whole()
        return shared(cache.rows[index])
    return cache.extract(index)


def _own(cache: Any) -> Any:
    return alone(cache) if isinstance(cache, CompressedKVCache) else cache


class PromptStore(LRUPromptCache):
    """mlx-lm's LRUPromptCache, which knows what leaves it.

    Attributes:
        disk: where prompt caches go that it evicts, or None.
    """

    disk: DiskCache | None
    _counts: Counts
    _entries: "_Entries"
    # What was found before it was evicted: model, tokens, the caches and the rest, room.
    _set_aside: tuple[Any, Tokens | None, Any, int | None] = None, None, None, None

    @classmethod
    def of(
        cls, cache: LRUPromptCache, counts: Counts, disk: DiskCache | None = None
    ) -> "PromptStore":
        """Make ``cache`` one of these, in place: whoever holds it goes on with it.

        Args:
            counts: where look-ups are counted.
        """
        known = [place for places in cache._lru._lrus.values() for place in places]
        held, cache.__class__ = cache._trie, cls
        store: Any = cache
        store._counts, store.disk = counts, disk
        store._entries = store._trie = _Entries(store._evicted)
        for model, tokens in known:
            store._trie.add(model, tokens, held.get(model, tokens))
        return store

    def entries(self) -> Iterator[Any]:
        """What is kept, each with its prompt cache."""
        return iter(list(self._entries.entries.values()))

    def fetch_nearest_cache(self, model: Any, tokens: Tokens):
        """The longest beginning of ``tokens`` that was kept, never all of them, and the rest."""
        *asked, found, room = self._set_aside
        self._set_aside = PromptStore._set_aside
        if asked != [model, tokens]:
            found, room = self._nearest(model, tokens), None
        cache, rest = found
        where = None if cache is None else MEMORY
        if self.disk is not None:
            read = self.disk.fetch(model, tokens, len(tokens) - len(rest), room)
            if read is not None:
                (cache, count), where = read, DISK
                rest = tokens[count:]
        self._counts.found(where, len(tokens) - len(rest))
        return cache, rest

    def set_aside(self, model: Any, tokens: Tokens, room: int) -> None:
        """Find what memory has of ``tokens`` before it is evicted to make room for them.

        Args:
            room: the bytes that there are for their caches.
        """
        if self._set_aside[:2] != (model, tokens):
            self._set_aside = model, tokens, self._nearest(model, tokens), room

    def _nearest(self, model: Any, tokens: Tokens) -> tuple[list[Any] | None, Tokens]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and not rest:
            # mlx-lm can't continue a prompt that has no tokens left.
            trimmable = can_trim_prompt_cache(cache)
            if trimmable:
                trim_prompt_cache(cache, 1)
            return (cache, tokens[-1:]) if trimmable else (None, tokens)
        return cache, rest

    def insert_cache(
        self, model: Any, tokens: Tokens, prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep a prompt cache; one that there was no room for is empty."""
        if isinstance(prompt_cache, Moved):
            own = [rebuilt(cache, _own) for cache in prompt_cache]
            # The server holds it for a while, and so the arrays of the batch.
            prompt_cache.clear()
            prompt_cache = own
        if prompt_cache:
            # What is not evaluated yet holds the arrays of the batch that it is to be a part of.
            mx.eval([cache.state for cache in prompt_cache])
            super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)

    @property
    def held_nbytes(self) -> int:
        """The bytes of all that is kept and of what is being written to disk."""
        return self.nbytes + (self.disk.pending if self.disk else 0)

    def make_room(self, nbytes: int) -> bool:
        """Keep no more than ``nbytes``; whether that is so already: writing takes a while."""
        self.trim_to(n_bytes=nbytes)
        return self.held_nbytes <= nbytes

    def settle(self, nbytes: int) -> bool:
        """The same, and wait for what is being written; False if there is less than no room."""
        self.make_room(nbytes)
        if self.disk is not None:
            self.disk.wait_until(lambda: self.held_nbytes <= nbytes)
        return nbytes >= 0

    def _evicted(self, model: Any, tokens: Tokens, entry: Any) -> None:
        if self.disk is not None:
            self.disk.keep(model, tokens, entry.prompt_cache, entry.nbytes)


class _Entries(PromptTrie):
    """The trie of a prompt cache, which knows what is in it and tells what is evicted."""

    def __init__(self, evicted: Callable[[Any, Tokens, Any], None]):
        super().__init__()
        self.entries: dict[int, Any] = {}
        self._evicted = evicted

    def add(self, model: Any, tokens: Tokens, value: Any):
        self.entries[id(value)] = value
        return self._forgotten(super().add(model, tokens, value))

    def pop(self, model: Any, tokens: Tokens):
        value = self._forgotten(super().pop(model, tokens))
        self._evicted(model, tokens, value)
        return value

    def pop_prefixes(self, model: Any, tokens: Tokens):
        popped = super().pop_prefixes(model, tokens)
        for _, value in popped:
            self._forgotten(value)
        return popped

    def _forgotten(self, value: Any) -> Any:
        self.entries.pop(id(value), None)
        return value

"""Who sees what: which tokens a query reads exactly and which through their codes."""

from typing import NamedTuple

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..per_thread import cached_per_thread

# Tokens that are encoded at once. Small, so that little more than the window is
# kept in full precision; large enough that almost no step of decoding encodes anything.
BLOCK = 32

# How far a cache can be trimmed without any trace: speculative decoding rewinds by
# a few tokens, and full-precision tokens that a later query gave up must still be there.
ROLLBACK = 16

# A window that no sequence leaves: all tokens stay in full precision.
ENDLESS = 2**30


class Visibility(NamedTuple):
    """Who reads which key exactly.

    A query at position p reads the key at t exactly if t is one of the first
    ``sinks`` tokens, or if t's block of 32 tokens is at most ``window`` / 32
    blocks older than p's; it reads every other key through its codes. This is a
    function of two positions: when codes were written never matters.

    A prompt's pass of more than 16 tokens reads more: each of its queries reads
    exactly what the first one does, and all of the pass's own tokens. One causal
    attention serves such a pass. Unless ``invariant``: then positions alone decide
    for prompts, too, and it does not matter how a prompt was cut into chunks.

    Attributes:
        window: a multiple of 32; at least that many newest tokens are in full precision.
        sinks: the number of first tokens that are always in full precision.
        invariant: whether prompts follow the rule of positions; None is False until the settings
            of the model that uses the cache say.
    """

    window: int = 160
    sinks: int = 4
    invariant: bool | None = None

    def is_prompt(self, count: int) -> bool:
        """Whether all queries of a pass of ``count`` tokens read exactly what the first does."""
        return count > ROLLBACK and not self.invariant

    @property
    def most_full_tokens(self) -> int:
        """The most full-precision tokens after the sinks that queries and trims can need."""
        return self.window + BLOCK + ROLLBACK

    def full_from(self, position: int) -> int:
        """The first position, after the sinks, that the window of ``position`` has."""
        return max(self.sinks, (position // BLOCK) * BLOCK - self.window)

    def covers(self, count: int) -> bool:
        """Whether a query at the end of a block reads its newest ``count`` tokens all exactly."""
        return count <= self.window + BLOCK

    def changes(self, start: int, end: int) -> range:
        """The positions after ``start`` and before ``end`` at which the window moves on."""
        first = max(start, self.window + self.sinks) // BLOCK * BLOCK + BLOCK
        return range(first, end, BLOCK)

    def retained_from(self, offset: int, fixed_shapes: bool) -> int:
        """The first position, after the sinks, that tokens from ``offset`` on can need exactly.

        Args:
            fixed_shapes: whether as many tokens as can ever be needed are kept, always.
        """
        if fixed_shapes:
            return offset - self.most_full_tokens
        return self.full_from(max(0, offset - ROLLBACK))

    def first_without(self, token: int) -> int:
        """The first position of a query that reads the token at ``token`` through its code."""
        return ((token + self.window) // BLOCK + 1) * BLOCK


class Ring(NamedTuple):
    """How far back the queries of mlx-lm's RotatingKVCache see.

    It keeps the first ``keep`` tokens and the newest of the others, ``max_size`` together.
    With a chunk of several tokens, the queries after the first see ``max_size`` tokens
    each, counted from the newest: towards the end of a chunk not even the kept ones.

    Attributes:
        whole: whether the queries after the first see as far back as it does, because
            another mask than the ring's says what they see.
    """

    max_size: int
    keep: int
    whole: bool = False

    def oldest(self, start: int, query):
        """The oldest kept and the oldest later position that a query sees.

        Args:
            start: the tokens before the chunk.
            query: the number of the query in the chunk, or an array of such numbers.
        """
        before = min(self.max_size - 1, start)
        query = 0 if self.whole else query
        hidden = _at_least(0, before + query + 1 - self.max_size)
        return hidden, _at_least(self.keep, hidden) + start - before

    def columns(self, start: int, count: int) -> int | None:
        """How many tokens RotatingKVCache returns for a chunk of ``count``; None if rotated."""
        if count == 1 and start >= self.max_size:
            return None
        return min(self.max_size - 1, start) + count

    def mask(self, start: int, count: int, return_array: bool = False) -> str | mx.array | None:
        """The mask of a chunk of ``count`` tokens for the tokens that its first query sees."""
        if count == 1:
            return None
        before = min(self.max_size - 1, start)
        if before + count > self.max_size or return_array:
            return _window_mask(count, before, self.max_size)
        return "causal"


# All layers get the same, which tells it from the masks of others. By thread, since lazy
# arrays must not be shared by threads.
@cached_per_thread(maxsize=2)
def _window_mask(count: int, before: int, window: int) -> mx.array:
    return create_causal_mask(count, before, window_size=window)


def _at_least(low: int, number):
    return mx.maximum(number, low) if isinstance(number, mx.array) else max(number, low)

"""Where tokens go when they come, and who sees them then: counted once for all layers."""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..backends.tokens import Places, Plan
from ..per_thread import cached_per_thread
from .visibility import ROLLBACK, Ring, Visibility


@dataclass(eq=False)
class StepPlan:
    """What the queries of one pass see, which positions alone decide.

    Args:
        visibility, ring: who sees what exactly, and how far back; None for all the way.
        first_quantized, quantized: there are codes of the positions ``first_quantized``, ...,
            ``quantized`` - 1.
        held: how many full-precision tokens there are, those of the pass among them.
        start, end: the position of the first query, and one more than that of the last.
        is_prompt: whether all queries read exactly what the first does, see
            :class:`Visibility`.

    Attributes:
        queries: how many there are.
        sinks: how many of the full-precision tokens are sinks.
        full_start: the position of the first full-precision token after the sinks.
        shared: what attention has made of it for all layers, under keys of its own.
    """

    visibility: Visibility
    ring: Ring | None
    first_quantized: int
    quantized: int
    held: int
    start: int
    end: int
    is_prompt: bool

    def __post_init__(self):
        self.queries = self.end - self.start
        self.sinks = min(self.visibility.sinks, self.end)
        self.full_start = self.end - (self.held - self.sinks)
        self.shared: dict[Any, Any] = {}

    def full_from(self, position: int) -> int:
        """The first position, after the sinks, that a query at ``position`` reads exactly.

        After a long trim some tokens that it would read so are only there as codes.
        """
        if self.is_prompt:
            position = self.start
        return max(self.visibility.full_from(position), self.full_start)

    @property
    def columns(self) -> int | None:
        """See :meth:`CompressedKVCache.columns`."""
        if self.ring is None:
            return self.end
        return self.ring.columns(self.start, self.queries)

    @functools.cached_property
    def forgets(self) -> bool:
        """Whether some query sees less of the past than the first."""
        return self.ring is not None and self.oldest(self.queries - 1)[0] > 0

    def slot(self, position: int) -> int:
        """Where a token from ``full_start`` on stands among the full-precision ones."""
        return position - self.full_start + self.sinks

    def oldest(self, query):
        """Positions of the oldest sink and the oldest later token that a query sees.

        Args:
            query: the number of the query, or an array of such numbers.
        """
        if self.ring is None:
            return 0, self.sinks
        return self.ring.oldest(self.start, query)

    def knows(self, mask: str | mx.array | None) -> bool:
        """Whether ``mask`` is what a ring itself made for this pass."""
        if self.ring is None:
            return False
        return mask is self.ring.mask(self.start, self.queries, isinstance(mask, mx.array))

    @functools.cached_property
    def whole(self) -> "StepPlan":
        """The same, but all queries see as far back as the first."""
        return replace(self, ring=self.ring and self.ring._replace(whole=True))


# By thread, as is what attention makes of it.
plan_view = cached_per_thread(maxsize=16)(StepPlan)


class Step(NamedTuple):
    """What becomes of a cache when tokens come.

    Attributes:
        sinks: how many of the full-precision tokens that are there are sinks.
        drop: how many after these go before the new ones come.
        encode_to: the position before which all need codes.
        is_step: whether what has become old went before the new tokens came, not after.
        plan: what the queries of the new tokens see then.
    """

    sinks: int
    drop: int
    encode_to: int
    is_step: bool
    plan: StepPlan


# Counting takes longer than launching.
@cached_per_thread(maxsize=64)
def plan_step(
    visibility: Visibility,
    ring: Ring | None,
    fixed_shapes: bool,
    first_quantized: int,
    quantized: int,
    held: int,
    start: int,
    end: int,
    is_prompt: bool | None,
) -> Step:
    """The step of the tokens start, ..., end - 1.

    Args:
        fixed_shapes: see :func:`plan_pass`.
        held: the full-precision tokens that are there, without those that come.
        visibility, ring, first_quantized, quantized, is_prompt: see :class:`StepPlan`; None is
            what the number of tokens says.
    """
    if is_prompt is None:
        is_prompt = visibility.is_prompt(end - start)
    sinks, drop = min(visibility.sinks, start), 0
    encode_to = visibility.full_from(end - 1)
    is_step = end - start <= ROLLBACK and not is_prompt
    if is_step:
        # No query of a step reads what is forgotten after it.
        retained = min(visibility.retained_from(end, fixed_shapes), quantized)
        if ring is not None:
            oldest = ring.oldest(start, 0)[1]
            # What gets codes now has to be there.
            gets_codes = encode_to > max(quantized, sinks)
            retained = max(retained, min(oldest, quantized) if gets_codes else oldest)
        drop = min(held - sinks, max(0, retained - (start - (held - sinks))))
    if encode_to > max(quantized, visibility.sinks):
        quantized = encode_to
    held += end - start - drop
    plan = plan_view(visibility, ring, first_quantized, quantized, held, start, end, is_prompt)
    return Step(sinks, drop, encode_to, is_step, plan)


@functools.lru_cache(maxsize=64)
def plan_pass(
    visibility: Visibility,
    fixed_shapes: bool,
    first_quantized: int,
    quantized: int,
    held: int,
    start: int,
    end: int,
) -> Plan | None:
    """The pass of the tokens start, ..., end - 1, or None if nothing is to be encoded.

    Args:
        fixed_shapes: see :meth:`Visibility.retained_from`.
        first_quantized, quantized: see :class:`View`; there are codes for all that the first token
            reads through them.
        held: the full-precision tokens that are there, those of the pass among them.
    """
    # Up to what the next token reads, so that the next pass finds the codes it needs.
    encode_to = visibility.full_from(end)
    if encode_to <= max(quantized, visibility.sinks):
        return None
    sinks = min(visibility.sinks, end)
    full_start = end - (held - sinks)
    reads_from = max(sinks, visibility.full_from(start), full_start)
    retained = min(visibility.retained_from(end, fixed_shapes), encode_to)
    kept = sinks + max(0, retained - full_start)
    decoded, slot = reads_from - sinks, reads_from - full_start + sinks
    places = Places(
        left=0,
        sinks=sinks,
        first_code=sinks - first_quantized,
        decoded=decoded,
        first_full=slot,
        full=end - reads_from,
        total=end,
        first_kept=kept,
        kept=held - kept,
    )
    # Full-precision tokens stand behind the decoded ones.
    first = quantized if quantized < sinks else sinks + decoded + quantized - reads_from
    return Plan(places, quantized, range(first, first + encode_to - quantized))

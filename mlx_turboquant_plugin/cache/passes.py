"""Where tokens go when they come: counted once for all layers."""

import functools
from typing import NamedTuple

from ..kernels.dequantize import Places
from ..kernels.prompt import Plan
from .visibility import Visibility


class Step(NamedTuple):
    """What becomes of exact tokens when others come.

    Attributes:
        sinks: how many of those that are there are sinks.
        forgettable: how many after these no query needs from the end of the new ones on.
        encode_to: the position before which all need codes.
    """

    sinks: int
    forgettable: int
    encode_to: int


# Counting takes longer than launching.
@functools.lru_cache(maxsize=64)
def plan_step(
    visibility: Visibility, steady: bool, coded: int, held: int, start: int, end: int
) -> Step:
    """The step of the tokens start, ..., end - 1.

    Args:
        steady, coded: see :func:`plan_pass`.
        held: the exact tokens that are there, without those that come.
    """
    sinks = min(visibility.sinks, start)
    exact_start = start - (held - sinks)
    retained = min(visibility.retained_from(end, steady), coded)
    return Step(sinks, max(0, retained - exact_start), visibility.exact_from(end - 1))


@functools.lru_cache(maxsize=64)
def plan_pass(
    visibility: Visibility,
    steady: bool,
    first_coded: int,
    coded: int,
    held: int,
    start: int,
    end: int,
) -> Plan | None:
    """The pass of the tokens start, ..., end - 1, or None if nothing is to be encoded.

    Args:
        steady: see :meth:`Visibility.retained_from`.
        first_coded, coded: see :class:`View`; there are codes for all that the first token
            reads through them.
        held: the exact tokens that are there, those of the pass among them.
    """
    # Up to what the next token reads, so that the next pass finds the codes it needs.
    encode_to = visibility.exact_from(end)
    if encode_to <= max(coded, visibility.sinks):
        return None
    sinks = min(visibility.sinks, end)
    exact_start = end - (held - sinks)
    reads_from = max(sinks, visibility.exact_from(start), exact_start)
    retained = min(visibility.retained_from(end, steady), encode_to)
    kept = sinks + max(0, retained - exact_start)
    decoded, slot = reads_from - sinks, reads_from - exact_start + sinks
    places = Places(
        left=0,
        sinks=sinks,
        first_code=sinks - first_coded,
        decoded=decoded,
        first_exact=slot,
        exact=end - reads_from,
        total=end,
        first_kept=kept,
        kept=held - kept,
    )
    # Exact tokens stand behind the decoded ones.
    first = coded if coded < sinks else sinks + decoded + coded - reads_from
    return Plan(places, coded, range(first, first + encode_to - coded))

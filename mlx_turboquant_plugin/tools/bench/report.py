"""The results as a table."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from ..output import interruption
from ..tables import Column, table
from .measurement import Measurement, Results

MIB = 2**20
TITLES = {
    "call": "attention of one layer, decoding: a step timed from Python to the result",
    "chain": "attention of one layer, decoding: its share of a chain of {layers} layers",
    "decode": "decoding with a model, after random keys and values (equal rows in a batch)",
    "prefill": "prompts in steps of {chunk}, up to the first token; those of a batch have from an "
    "eighth of the tokens to all",
}


def lines(notes: dict[str, Any], results: Results) -> Iterator[str]:
    """The table, a line at a time."""
    yield (
        f"{notes['device']}, kernel {notes['kernel']}; compressed: "
        f"{notes['key_bits']}-bit keys, {notes['value_bits']}-bit values, window "
        f"{notes['window']}{', invariant' * notes['invariant']}; "
        f"QuantizedKVCache: {notes['kv_bits']} bits"
    )
    yield f"layer: {notes['layer']}; model: {notes['model']}"
    yield from (*interruption(results.missing), *notes["remarks"])
    parts = {m.part for m in results.measurements}
    for part, title in TITLES.items():
        if part in parts:
            yield ""
            yield title.format(**notes)
            yield from _table(part, [m for m in results.measurements if m.part == part])
    if results.skipped:
        yield ""
    for skipped in results.skipped:
        yield (
            f"not measured: {skipped.part}, {skipped.tokens} tokens, batch {skipped.batch}, "
            f"{skipped.cache}: {skipped.reason}"
        )
    yield from notes["fallbacks"]
    yield ""
    yield (
        "speed: how many times faster than the first cache of the group, by medians; by means "
        "it has every 32nd step, which encodes, in it; spread: between the quartiles"
    )
    yield "cache, peak: MiB, and the first one's divided by it; peak: beyond the weights"
    if "prefill" in parts:
        yield (
            "first: the first time in this process, with all that is compiled and read for it; the "
            "first cache of a group pays for what they share, and the first group for the others"
        )


def _table(part: str, measured: list[Measurement]) -> Iterator[str]:
    groups = defaultdict(list)
    for m in measured:
        groups[m.tokens, m.batch, m.dtype].append(m)
    return table(COLUMNS[part], [(m, group[0]) for group in groups.values() for m in group])


def _column(title: str, style: str, value: Callable[[Measurement, Measurement], Any]) -> Column:
    """``value(m, first of the group)`` is None where nothing is known."""

    def read(row: tuple[Measurement, Measurement]) -> str:
        found = value(*row)
        return "-" if found is None else format(found, style)

    return Column(title, ">", read)


def _median(m: Measurement) -> float | None:
    return m.seconds.median if m.seconds else None


def _ratio(value: Callable[[Measurement], float | None]) -> Callable:
    """How many times the first one's ``value`` is this one's."""

    def ratio(m: Measurement, base: Measurement) -> float | None:
        one, other = value(base), value(m)
        return one / other if one and other else None

    return ratio


def _scaled(value: Callable[[Measurement], float | None], factor: float) -> Callable:
    def scaled(m: Measurement, base: Measurement) -> float | None:
        found = value(m)
        return None if found is None else factor * found

    return scaled


SITUATION = [
    _column("tokens", "", lambda m, base: m.tokens),
    _column("batch", "", lambda m, base: m.batch),
    _column("dtype", "", lambda m, base: m.dtype),
    _column("cache", "", lambda m, base: m.cache),
]
FIRST = [
    _column("first ms", ".1f", _scaled(lambda m: m.first, 1e3)),
    _column("speed", ".2f", _ratio(lambda m: m.first)),
]
TIMES = [
    _column("ms", ".3f", _scaled(_median, 1e3)),
    _column("spread", ".1%", lambda m, base: m.seconds and m.seconds.spread),
    _column("speed", ".2f", _ratio(_median)),
]
MEANS = [_column("means", ".2f", _ratio(lambda m: m.seconds.mean if m.seconds else None))]
THROUGHPUT = [
    _column("tokens/s", ".1f", lambda m, base: m.seconds and m.processed / m.seconds.median)
]
CACHE = [
    _column("cache", ".2f", _scaled(lambda m: m.cache_bytes, 1 / MIB)),
    _column("ratio", ".2f", _ratio(lambda m: m.cache_bytes)),
]
PEAK = [
    _column("peak", ".2f", _scaled(lambda m: m.peak_bytes, 1 / MIB)),
    _column("ratio", ".2f", _ratio(lambda m: m.peak_bytes)),
]
COLUMNS = {
    "call": SITUATION + TIMES + MEANS + CACHE,
    "chain": SITUATION + TIMES + MEANS + CACHE,
    "decode": SITUATION + TIMES + MEANS + THROUGHPUT + CACHE + PEAK,
    "prefill": SITUATION + FIRST + TIMES + THROUGHPUT + CACHE + PEAK,
}

"""The results as a table."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .measurement import Measurement, Results

MIB = 2**20
TITLES = {
    "call": "attention of one layer, decoding: a step timed from Python to the result",
    "chain": "attention of one layer, decoding: its share of a chain of {layers} layers",
    "decode": "decoding with a model, after random keys and values (equal rows in a batch)",
    "prefill": "prompts in steps of {chunk}, up to the first token; those of a batch have from an "
    "eighth of the tokens to all",
}


class Column(NamedTuple):
    """A column of the table: ``value(m, first of the group)`` is None where nothing is known."""

    title: str
    width: int
    style: str
    value: Callable[[Measurement, Measurement], Any]


def lines(notes: dict[str, Any], results: Results) -> Iterator[str]:
    """The table, a line at a time."""
    yield (
        f"{notes['device']}, kernel {notes['kernel']}; compressed: "
        f"{notes['key_bits']}-bit keys, {notes['value_bits']}-bit values, window "
        f"{notes['window']}{', invariant' * notes['invariant']}; "
        f"QuantizedKVCache: {notes['kv_bits']} bits"
    )
    yield f"layer: {notes['layer']}; model: {notes['model']}"
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
    columns = COLUMNS[part]
    yield " ".join(f"{column.title:>{column.width}}" for column in columns)
    groups = defaultdict(list)
    for m in measured:
        groups[m.tokens, m.batch, m.dtype].append(m)
    for group in groups.values():
        for m in group:
            cells = (_cell(column, m, group[0]) for column in columns)
            yield " ".join(f"{text:>{column.width}}" for text, column in zip(cells, columns))


def _cell(column: Column, m: Measurement, base: Measurement) -> str:
    value = column.value(m, base)
    return "-" if value is None else format(value, column.style)


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
    Column("tokens", 7, "", lambda m, base: m.tokens),
    Column("batch", 5, "", lambda m, base: m.batch),
    Column("dtype", 9, "", lambda m, base: m.dtype),
    Column("cache", 17, "", lambda m, base: m.cache),
]
FIRST = [
    Column("first ms", 10, ".1f", _scaled(lambda m: m.first, 1e3)),
    Column("speed", 6, ".2f", _ratio(lambda m: m.first)),
]
TIMES = [
    Column("ms", 10, ".3f", _scaled(_median, 1e3)),
    Column("spread", 7, ".1%", lambda m, base: m.seconds and m.seconds.spread),
    Column("speed", 6, ".2f", _ratio(_median)),
]
MEANS = [Column("means", 6, ".2f", _ratio(lambda m: m.seconds.mean if m.seconds else None))]
THROUGHPUT = [
    Column("tokens/s", 9, ".1f", lambda m, base: m.seconds and m.processed / m.seconds.median)
]
CACHE = [
    Column("cache", 9, ".2f", _scaled(lambda m: m.cache_bytes, 1 / MIB)),
    Column("ratio", 6, ".2f", _ratio(lambda m: m.cache_bytes)),
]
PEAK = [
    Column("peak", 9, ".2f", _scaled(lambda m: m.peak_bytes, 1 / MIB)),
    Column("ratio", 6, ".2f", _ratio(lambda m: m.peak_bytes)),
]
COLUMNS = {
    "call": SITUATION + TIMES + MEANS + CACHE,
    "chain": SITUATION + TIMES + MEANS + CACHE,
    "decode": SITUATION + TIMES + MEANS + THROUGHPUT + CACHE + PEAK,
    "prefill": SITUATION + FIRST + TIMES + THROUGHPUT + CACHE + PEAK,
}

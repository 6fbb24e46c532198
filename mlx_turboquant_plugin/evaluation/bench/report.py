"""The results as a table and as JSON."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any, Dict, Iterator, List, Optional

from .measurement import Measurement, Results, Timing

MIB = 2**20
TITLES = {
    "call": "attention of one layer, decoding: a step timed from Python to the result",
    "chain": "attention of one layer, decoding: its share of a chain of {layers} layers",
    "decode": "decoding with a model, after random keys and values (equal rows in a batch)",
    "prefill": "a prompt in chunks of {chunk}",
}


def as_json(notes: Dict[str, Any], results: Results) -> Dict[str, Any]:
    """Everything, as what :mod:`json` can write: seconds and bytes."""
    return {"notes": notes, **asdict(results)}


def lines(notes: Dict[str, Any], results: Results) -> Iterator[str]:
    """The table, a line at a time."""
    yield (
        f"{notes['device']}, kernel {notes['kernel']}; compressed: "
        f"{notes['key_bits']}-bit keys, {notes['value_bits']}-bit values, window "
        f"{notes['window']}; QuantizedKVCache: {notes['kv_bits']} bits"
    )
    yield f"layer: {notes['layer']}; model: {notes['model']}"
    for part, title in TITLES.items():
        measured = [m for m in results.measurements if m.part == part]
        if measured:
            yield ""
            yield title.format(**notes)
            yield from _table(part, measured)
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


def _table(part: str, measured: List[Measurement]) -> Iterator[str]:
    whole_model = part in ("decode", "prefill")
    yield (
        f"{'tokens':>7} {'batch':>5} {'dtype':>9} {'cache':>17} {'ms':>10} {'spread':>7} "
        f"{'speed':>6} {'means':>6}" + f" {'tokens/s':>9}" * whole_model
        + f" {'cache':>9} {'ratio':>6}" + f" {'peak':>9} {'ratio':>6}" * whole_model
    )
    groups = defaultdict(list)
    for m in measured:
        groups[m.tokens, m.batch, m.dtype].append(m)
    for group in groups.values():
        base = group[0]
        for m in group:
            done = m.tokens if part == "prefill" else m.batch
            yield (
                f"{m.tokens:>7} {m.batch:>5} {m.dtype:>9} {m.cache:>17} "
                f"{1e3 * m.seconds.median:>10.3f} {_spread(m.seconds):>7.1%} "
                f"{base.seconds.median / m.seconds.median:>6.2f} "
                f"{base.seconds.mean / m.seconds.mean:>6.2f}"
                + f" {done / m.seconds.median:>9.1f}" * whole_model
                + _bytes(m.cache_bytes, base.cache_bytes)
                + _bytes(m.peak_bytes, base.peak_bytes)
            )


def _spread(seconds: Timing) -> float:
    return (seconds.high - seconds.low) / seconds.median


def _bytes(ours: Optional[int], base: Optional[int]) -> str:
    return "" if ours is None else f" {ours / MIB:>9.2f} {base / ours:>6.2f}"

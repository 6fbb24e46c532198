"""Speed and memory against length, as a PNG. Needs matplotlib, which is an extra."""

import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ...rules import SettingsError
from ..arguments import write
from .measurement import BATCH_KVCACHE, COMPRESSED, KVCACHE, QUANTIZED, Measurement, Results

# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = {
    KVCACHE: "#000000",
    BATCH_KVCACHE: "#999999",
    QUANTIZED: "#E69F00",
    COMPRESSED: "#0072B2",
}
# One for each dtype and batch size.
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
MIB = 2**20


class Span(NamedTuple):
    """A figure, and where the quartiles of its turns are."""

    value: float
    low: float
    high: float


class Panel(NamedTuple):
    """One diagram: some figure of a part against the number of tokens.

    Attributes:
        better: how the compressed cache's figure makes ``ratio`` above 1: "less" or "more".
        ratio: what the ratio is of, in words with a place for the other cache.
    """

    part: str
    title: str
    unit: str
    figure: Callable[[Measurement], Span]
    better: str
    ratio: str


def _milliseconds(m: Measurement) -> Span:
    return Span(1e3 * m.seconds.median, 1e3 * m.seconds.low, 1e3 * m.seconds.high)


def _speed(m: Measurement) -> Span:
    slow, fast = m.processed / m.seconds.high, m.processed / m.seconds.low
    return Span(m.processed / m.seconds.median, slow, fast)


def _first_speed(m: Measurement) -> Span:
    return Span(*[m.processed / m.first] * 3)


def _cache(m: Measurement) -> Span:
    return Span(*[m.cache_bytes / MIB] * 3)


def _peak(m: Measurement) -> Span:
    return Span(*[m.peak_bytes / MIB] * 3)


SPEED, SIZE = "times as fast as {}", "times smaller than {}"
PANELS = (
    Panel("call", "one layer, a step from Python", "ms", _milliseconds, "less", SPEED),
    Panel("chain", "one layer, inside a chain", "ms", _milliseconds, "less", SPEED),
    Panel("decode", "decoding", "tokens/s", _speed, "more", SPEED),
    Panel("prefill", "prompt", "tokens/s", _speed, "more", SPEED),
    Panel("prefill", "prompt, the first time", "tokens/s", _first_speed, "more", SPEED),
    Panel("decode", "cache", "MiB", _cache, "less", SIZE),
    Panel("decode", "decoding, peak memory", "MiB", _peak, "less", SIZE),
    Panel("prefill", "prompt, peak memory", "MiB", _peak, "less", SIZE),
)
COLUMNS = 3


def check() -> None:
    """Raise SettingsError unless diagrams can be drawn."""
    if find_spec("matplotlib") is None:
        raise SettingsError(
            "--plot needs matplotlib, which is not installed: "
            "pip install 'mlx-turboquant-plugin[plot]', or leave --plot out"
        )


def draw(path: Path, notes: dict[str, Any], results: Results) -> None:
    """Draw what was measured to the file ``path``, a PNG.

    Raises:
        SettingsError: it can't be written.
    """
    # Drawing to a file needs neither a window system nor pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # An interrupted run may have others, which have not had a turn.
    measured = [m for m in results.measurements if m.samples]
    parts = {m.part for m in measured}
    kinds = list(dict.fromkeys((m.dtype, m.batch) for m in measured))
    panels = [panel for panel in PANELS if panel.part in parts]
    columns = max(1, min(COLUMNS, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{notes['device']}, kernel {notes['kernel']}; {notes['model']}", fontsize=10)
    for index, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, index)
        _panel(axes, panel, [m for m in measured if m.part == panel.part], kinds)
    # Many panels share few lines: one legend, where it hides none of them.
    handles = [axes.get_legend_handles_labels() for axes in figure.axes]
    legend = {label: handle for pair in handles for handle, label in zip(*pair)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write(path, png.getvalue())


def _panel(
    axes: Any, panel: Panel, measured: list[Measurement], kinds: list[tuple[str, int]]
) -> None:
    for index, kind in enumerate(kinds):
        style = LINES[index % len(LINES)] + MARKERS[index % len(MARKERS)]
        for cache, colour in COLOURS.items():
            points = sorted(
                (m.tokens, *panel.figure(m))
                for m in measured
                if (m.dtype, m.batch, m.cache) == (*kind, cache)
            )
            if points:
                tokens, values, lows, highs = zip(*points)
                spread = [
                    [value - low for value, low in zip(values, lows)],
                    [high - value for value, high in zip(values, highs)],
                ]
                label = f"{cache}, {kind[0]}, batch {kind[1]}"
                axes.errorbar(
                    tokens, values, spread, fmt=style, color=colour, label=label, ms=5, capsize=3
                )
    axes.set_xscale("log", base=2)
    lengths = sorted({m.tokens for m in measured})
    axes.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_title("\n".join([panel.title, *in_words(panel, measured)]), fontsize=9)
    axes.set_xlabel("tokens")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)


def in_words(panel: Panel, measured: list[Measurement]) -> list[str]:
    """A line for each uncompressed cache: how the compressed one compares, least to most."""
    found = []
    for other in (KVCACHE, BATCH_KVCACHE):
        theirs, ours = (
            {
                (m.tokens, m.dtype, m.batch): panel.figure(m).value
                for m in measured
                if m.cache == cache
            }
            for cache in (other, COMPRESSED)
        )
        ratios = [
            theirs[at] / ours[at] if panel.better == "less" else ours[at] / theirs[at]
            for at in ours
            if at in theirs
        ]
        if ratios:
            low, high = (f"{end:.2f}" for end in (min(ratios), max(ratios)))
            span = low if low == high else f"{low} to {high}"
            found.append(f"compressed: {span} {panel.ratio.format(other)}")
    return found

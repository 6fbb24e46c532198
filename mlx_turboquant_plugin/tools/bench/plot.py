"""Speed and memory against length, as an SVG."""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from .. import plots
from .measurement import BATCH_KVCACHE, COMPRESSED, KVCACHE, QUANTIZED, Measurement, Results, Timing

# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = {
    KVCACHE: "#000000",
    BATCH_KVCACHE: "#999999",
    QUANTIZED: "#E69F00",
    COMPRESSED: "#0072B2",
}
# One for each dtype and batch size.
DASHES = ("", "8 4", "2 3", "8 3 2 3")
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
    seconds = Timing.of(m.samples)
    return Span(1e3 * seconds.median, 1e3 * seconds.low, 1e3 * seconds.high)


def _speed(m: Measurement) -> Span:
    seconds = Timing.of(m.samples)
    slow, fast = m.processed / seconds.high, m.processed / seconds.low
    return Span(m.processed / seconds.median, slow, fast)


def _first_speed(m: Measurement) -> Span:
    assert m.first  # Prompts have one before they take turns.
    return Span(*[m.processed / m.first] * 3)


def _cache(m: Measurement) -> Span:
    return Span(*[m.cache_bytes / MIB] * 3)


def _peak(m: Measurement) -> Span:
    assert m.peak_bytes is not None  # Of a model.
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
# In pixels: the title of the whole, those of a panel, and a row of the legend.
HEAD, TITLES, ROW = 36, 64, 20
LINE = 17
STYLE = """\
svg { font: 12px system-ui, sans-serif; } .page { fill: #ffffff; }
text { fill: #444444; } .title { fill: #000000; font-size: 14px; font-weight: 600; }
polyline { fill: none; } g polyline, g line { stroke-width: 2; }
.grid line { stroke: #dddddd; stroke-width: 1; }
""" + "\n".join(
    f".s{i} polyline, .s{i} line {{ stroke: {colour}; }} .s{i} circle {{ fill: {colour}; }}"
    for i, colour in enumerate(COLOURS.values())
)


def picture(notes: dict[str, Any], results: Results) -> str:
    """What was measured, as the text of an SVG file."""
    # An interrupted run may have others, which have not had a turn.
    measured = [m for m in results.measurements if m.samples]
    kinds = list(dict.fromkeys((m.dtype, m.batch) for m in measured))
    shown = [
        (panel, found)
        for panel in PANELS
        if (found := [m for m in measured if m.part == panel.part])
    ]
    columns = max(1, min(COLUMNS, len(shown)))
    lines = [_lines(panel, found, kinds) for panel, found in shown]
    # Many panels share few lines: one legend, where it hides none of them.
    legend = list({line.name: line for some in lines for line in some}.values())
    bottom = HEAD + -(-len(shown) // columns) * (TITLES + plots.HEIGHT)
    width, height = columns * plots.WIDTH, bottom + -(-len(legend) // columns) * ROW + ROW
    about = f"{notes['device']}, kernel {notes['kernel']}; {notes['model']}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            f'<text class="title" x="{plots.LEFT}" y="24">{escape(about)}</text>',
            *_placed(
                [_panel(*each, some) for each, some in zip(shown, lines)],
                columns,
                HEAD,
                TITLES + plots.HEIGHT,
            ),
            *_placed([_sample(line) for line in legend], columns, bottom, ROW),
            "</svg>\n",
        ]
    )


def _placed(parts: Sequence[str], columns: int, top: int, height: int) -> Iterator[str]:
    """SVG of the parts, row by row."""
    for index, part in enumerate(parts):
        row, column = divmod(index, columns)
        yield f'<g transform="translate({column * plots.WIDTH} {top + row * height})">{part}</g>'


def _panel(panel: Panel, measured: list[Measurement], lines: list[plots.Line]) -> str:
    lengths = sorted({m.tokens for m in measured})
    top = max(high for line in lines for _, high in line.rises)
    chart = plots.line_chart(
        panel.title,
        plots.doublings("tokens", lengths),
        plots.linear(panel.unit, 0, 1.05 * top),
        lines,
    )
    words = "".join(
        f'<text x="{plots.LEFT}" y="{LINE * (2 + index)}">{escape(line)}</text>'
        for index, line in enumerate(in_words(panel, measured))
    )
    title = f'<text class="title" x="{plots.LEFT}" y="{LINE}">{escape(panel.title)}</text>'
    return f'{title}{words}<g transform="translate(0 {TITLES - LINE})">{chart}</g>'


def _lines(
    panel: Panel, measured: list[Measurement], kinds: list[tuple[str, int]]
) -> list[plots.Line]:
    """A curve for each cache, dtype and batch size that was measured."""
    lines = []
    for index, (dtype, batch) in enumerate(kinds):
        for series, cache in enumerate(COLOURS):
            spans = sorted(
                (m.tokens, panel.figure(m))
                for m in measured
                if (m.dtype, m.batch, m.cache) == (dtype, batch, cache)
            )
            if spans:
                lines.append(
                    plots.Line(
                        f"{cache}, {dtype}, batch {batch}",
                        series,
                        [(tokens, span.value) for tokens, span in spans],
                        [(span.low, span.high) for _, span in spans],
                        DASHES[index % len(DASHES)],
                    )
                )
    return lines


def _sample(line: plots.Line) -> str:
    """A row of the legend."""
    return (
        f'<g class="s{line.series}"><polyline points="{plots.LEFT},10 {plots.LEFT + 40},10"'
        f"{plots.dashes(line)}/></g>"
        f'<text x="{plots.LEFT + 50}" y="14">{escape(line.name)}</text>'
    )


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

"""The charts of the page that ``mlx_turboquant compare`` writes."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from . import plots
from .report import Report, Result

# Below this a KL is rounding: curves start there.
FLOOR = 1e-6
# The length, in tokens, at which sizes are quoted.
QUOTED = 8192


def figures(report: Report) -> Iterator[tuple]:
    """Heading, explanation, chart and the indices of the arms it shows."""
    lossy = [i for i, r in enumerate(report.results) if r.summary.kl.estimate > FLOOR]
    if lossy:
        yield _quality_against_size(report, lossy)
        yield _by_position(report, lossy)
    yield _by_length(report)
    if any(value > 0 for value in report.kl_by_layer):
        yield _by_layer(report)
    spans = [
        i
        for i, r in enumerate(report.results)
        if r.summary.change.low is not None and math.isfinite(r.summary.change.estimate)
    ]
    if spans:
        yield _changes(report, spans)


def _quality_against_size(report: Report, lossy: Sequence[int]) -> tuple:
    points = [
        plots.Point(r.name, i, report.smaller(r, QUOTED), r.summary.kl.estimate, rise=_rise(r))
        for i, r in ((i, report.results[i]) for i in lossy)
    ]
    x = plots.linear("times smaller than bfloat16", 1, max(p.x for p in points) + 0.5)
    ends = [end for p in points for end in (p.y, *(p.rise or ()))]
    y = plots.decades("mean KL, nats", min(ends), max(ends))
    return (
        "Quality against size",
        f"Best is low and to the right. Size at {QUOTED:,} tokens; bars are 95% confidence "
        "intervals.",
        plots.scatter("mean KL against size", x, y, points),
        [],
    )


def _rise(r: Result) -> tuple[float, float] | None:
    """The interval of the KL, for a logarithmic axis."""
    kl = r.summary.kl
    if kl.low is None:
        return None
    low, high = kl.ends
    return max(low, FLOOR), max(high, FLOOR)


def _by_position(report: Report, lossy: Sequence[int]) -> tuple:
    lines = [
        plots.Line(
            report.results[i].name,
            i,
            [
                ((k + 0.5) * report.bin, max(value, FLOOR))
                for k, value in enumerate(report.results[i].kl_by_position)
            ],
        )
        for i in lossy
    ]
    top = max(value for line in lines for _, value in line.points)
    return (
        "KL by position",
        f"Mean of each {report.bin} positions. The newest tokens are in full precision, so the "
        "start is free; it should be flat after that.",
        plots.line_chart(
            "KL by position",
            plots.linear("position", 0, report.length),
            plots.decades("mean KL, nats", FLOOR, max(top, 10 * FLOOR)),
            lines,
        ),
        lossy,
    )


def _by_length(report: Report) -> tuple:
    shown = [i for i, r in enumerate(report.results) if r.bits != "exact"]
    lines = [
        plots.Line(
            report.results[i].name,
            i,
            [(length, report.smaller(report.results[i], length)) for length in report.lengths],
        )
        for i in shown
    ]
    longest, plain = report.lengths[-1], report.bf16_by_length[-1]
    sizes = ", ".join(
        f"{report.results[i].name} {_mib(report.results[i].bytes_by_length[-1])}" for i in shown
    )
    return (
        "Memory by length",
        f"Times smaller than an uncompressed cache in bfloat16, every byte counted. At "
        f"{plots.count(longest)} tokens: bfloat16 {_mib(plain)}, {sizes}.",
        plots.line_chart(
            "memory by length",
            plots.doublings("tokens in the cache", report.lengths),
            plots.linear(
                "times smaller", 0, max(v for line in lines for _, v in line.points) + 0.5
            ),
            lines,
        ),
        shown,
    )


def _by_layer(report: Report) -> tuple:
    series = next(i for i, r in enumerate(report.results) if r.name == report.layer_arm)
    top = max(report.kl_by_layer)
    return (
        "KL by layer",
        f"One layer compressed at a time by the preset {escape(report.layer_arm)}, the others "
        "exact; first window. A layer that stands out deserves more bits.",
        plots.bar_chart(
            "KL by layer",
            "layer",
            plots.linear("mean KL, nats", 0, 1.05 * top),
            report.kl_by_layer,
            series,
        ),
        [],
    )


def _changes(report: Report, shown: Sequence[int]) -> tuple:
    points: list[plots.Point] = []
    ends = [-0.1, 0.1]
    for row, i in enumerate(shown):
        name, change = report.results[i].name, report.results[i].summary.change
        low, high = change.ends
        span = 100 * low, 100 * high
        if report.results[i].verdict.word == "broken":
            name += f": {change.estimate:+.0%}, off the scale"
        else:
            ends += span
        points.append(plots.Point(name, i, 100 * change.estimate, -row, span))
    return (
        "Change of perplexity",
        "Per cent, with 95% confidence intervals over windows.",
        plots.scatter(
            "change of perplexity",
            plots.linear("per cent", min(ends), max(ends)),
            plots.Axis("", -len(shown) + 0.5, 0.8, []),
            points,
        ),
        [],
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

"""The report of ``mlx_turboquant compare`` as one page that needs nothing else."""

import re
from html import escape
from pathlib import Path
from typing import Iterator, List, Sequence

from . import plots
from .report import Report, Result
from .statistics import SAME_CHANGE, SAME_KL, SAME_TOP1

STYLE = Path(__file__).with_name("page.css")
# Below this a KL is rounding: curves start there.
FLOOR = 1e-6
# The length, in tokens, at which sizes are quoted.
QUOTED = 8192


def page(report: Report) -> str:
    """HTML, with its style sheet and its plots inside."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    name = escape(Path(report.model).name)
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{name}: compressed KV caches compared</title>"
    yield f"<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n<main>"
    yield f"<h1>{name}</h1>"
    yield (
        f'<p class="lead">What compressing the KV cache costs and saves: {report.windows} windows of '
        f"{report.length:,} tokens of {escape(Path(report.source).name)}, every arm fed the same "
        f"tokens as the exact run (perplexity {report.exact_perplexity:.3f}).</p>"
    )
    yield from _cards(report)
    yield '<div class="plots">'
    for title, text, chart, shown in _figures(report):
        legend = _legend(report, shown)
        yield f"<figure><figcaption><h2>{title}</h2><p>{text}</p></figcaption>{legend}{chart}</figure>"
    yield "</div>"
    yield from _details(report)
    yield from _footer(report)
    yield "</main>\n</body>\n</html>"


def _cards(report: Report) -> Iterator[str]:
    yield '<div class="cards">'
    for index, r in enumerate(report.results):
        word = "no verdict" if r.verdict.word == "none" else r.verdict.word
        if r.bits == "exact":
            bits, size = "bypass", "exact<small>nothing is coded</small>"
        else:
            bits = f"{r.bits} bits"
            size = (
                f"{report.smaller(r, QUOTED):.2f}<small>× smaller at {plots.count(QUOTED)} "
                "tokens</small>"
            )
        yield (
            f'<section class="card s{index}"><h3>{escape(r.name)} <small>{bits}</small></h3>'
            f'<p class="big">{size}</p>'
            f"<dl><dt>mean KL</dt><dd>{_kl(r.summary.kl.estimate)}</dd>"
            f"<dt>same next token</dt><dd>{r.summary.top1.estimate:.2%}</dd>"
            f"<dt>perplexity</dt><dd>{r.summary.change.estimate:+z.2%}</dd></dl>"
            f'<p><b class="{r.verdict.word}">{word}</b> {_unbroken(r.verdict.reason)}</p></section>'
        )
    yield "</div>"


def _figures(report: Report) -> Iterator[tuple]:
    """Heading, explanation, chart and the indices of the arms it shows."""
    lossy = [i for i, r in enumerate(report.results) if r.summary.kl.estimate > FLOOR]
    if lossy:
        yield _quality_against_size(report, lossy)
        yield _by_position(report, lossy)
    yield _by_length(report)
    if any(value > 0 for value in report.kl_by_layer):
        yield _by_layer(report)
    spans = [i for i, r in enumerate(report.results) if r.summary.change.low is not None]
    if spans:
        yield _changes(report, spans)


def _quality_against_size(report: Report, lossy: Sequence[int]) -> tuple:
    points = [
        plots.Point(r.name, i, report.smaller(r, QUOTED), r.summary.kl.estimate)
        for i, r in ((i, report.results[i]) for i in lossy)
    ]
    x = plots.linear("times smaller than bfloat16", 1, max(p.x for p in points) + 0.5)
    y = plots.decades("mean KL, nats", min(p.y for p in points), max(p.y for p in points))
    return (
        "Quality against size",
        f"Best is low and to the right. Size at {QUOTED:,} tokens.",
        plots.scatter("mean KL against size", x, y, points),
        [],
    )


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
        f"Mean of each {report.bin} positions. The newest tokens are exact, so the start is "
        "free; it should be flat after that.",
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
            plots.linear("times smaller", 0, max(v for line in lines for _, v in line.points) + 0.5),
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
            "KL by layer", "layer", plots.linear("mean KL, nats", 0, 1.05 * top), report.kl_by_layer, series
        ),
        [],
    )


def _changes(report: Report, shown: Sequence[int]) -> tuple:
    points: List[plots.Point] = []
    ends = [-0.1, 0.1]
    for row, i in enumerate(shown):
        name, change = report.results[i].name, report.results[i].summary.change
        span = 100 * change.low, 100 * change.high
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


def _details(report: Report) -> Iterator[str]:
    heads = [
        "arm", "bits K/V", "mean KL", "99% KL", "top-1", "perplexity", "change [95%]",
        "bytes a token", "smaller", "tokens/s",
    ]
    if report.generated:
        heads += ["greedy: same for", "same places", "tokens/s"]
    yield '<h2>All figures</h2>\n<div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>"
    for r in report.results:
        s = r.summary
        cells = [
            escape(r.name), r.bits, _kl(s.kl.estimate), _kl(s.kl_p99), f"{s.top1.estimate:.2%}",
            f"{s.perplexity:.4f}", _change(r), f"{r.kv_bytes_per_token:,.0f}",
            f"{r.kv_ratio:.2f}×", f"{r.tokens_per_second:.0f}",
        ]
        if r.free is not None:
            cells += [r.free.same_for, f"{r.free.agreement:.0%}", f"{r.decode_tokens_per_second:.0f}"]
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div>"


def _footer(report: Report) -> Iterator[str]:
    notes = [
        f"Weights in {report.quality_dtype}; bytes counted in caches filled in "
        f"{report.kv_bytes_dtype}; bytes a token and the table's sizes at {report.length:,} tokens; "
        f"{report.chunk} tokens per forward pass.",
        "KL is that of the arm's next-token distribution from the exact run's, in nats.",
        f"Same: perplexity within {SAME_CHANGE:.1%}, mean KL within {SAME_KL:.1e} and top-1 at "
        f"{SAME_TOP1:.0%} or more, with their whole intervals.",
        *report.left_out,
    ]
    if report.generated:
        notes.append(
            f"Greedy: {report.generated} tokens after a prompt of {report.prompt:,}. One close "
            "choice that falls the other way parts two texts for good, so this is an anecdote."
        )
    yield '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _unbroken(text: str) -> str:
    """Text whose command line arguments stay on one line."""
    return re.sub(r"--\w+( \d+)?", r"<code>\g<0></code>", escape(text))


def _legend(report: Report, shown: Sequence[int]) -> str:
    items = "".join(
        f'<span class="s{i}"><i></i>{escape(report.results[i].name)}</span>' for i in shown
    )
    return f'<div class="legend">{items}</div>' if items else ""


def _kl(value: float) -> str:
    return f"{value:.1e}" if value > FLOOR else "rounding"


def _change(r: Result) -> str:
    change = r.summary.change
    if change.low is None:
        return f"{change.estimate:+z.2%}"
    return f"{change.estimate:+z.2%} [{change.low:+z.2%}, {change.high:+z.2%}]"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

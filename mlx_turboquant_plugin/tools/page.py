"""The report of ``mlx_turboquant compare`` as one page that needs nothing else."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from . import plots
from .figures import QUOTED, figures
from .page_tables import figures_table, kl_in_words, notes_list, task_tables, texts, worst_table
from .report import Report
from .statistics import RULE

STYLE = Path(__file__).with_name("page.css")


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
        f'<p class="lead">What compressing the KV cache costs and saves: {report.windows} windows '
        f"of {report.length:,} tokens of {escape(Path(report.source).name)}, every arm fed the "
        f"same tokens as the exact run (perplexity {report.exact.summary.perplexity:.3f}).</p>"
    )
    if report.notes:
        yield from notes_list(report.notes)
    yield from _cards(report)
    yield '<div class="plots">'
    for title, text, chart, shown in figures(report):
        legend = _legend(report, shown)
        caption = f"<figcaption><h2>{title}</h2><p>{text}</p></figcaption>"
        yield f"<figure>{caption}{legend}{chart}</figure>"
    yield "</div>"
    for part in (figures_table, task_tables, worst_table, texts):
        yield from part(report)
    yield from _footer(report)
    yield "</main>\n</body>\n</html>"


def _cards(report: Report) -> Iterator[str]:
    yield '<div class="cards">'
    for index, r in enumerate(report.results):
        word = "no verdict" if r.verdict.word == "none" else r.verdict.word
        if r.bits == "exact":
            bits, size = "bypass", "exact<small>nothing is quantized</small>"
        else:
            bits = f"{r.bits} bits"
            size = (
                f"{report.smaller(r, QUOTED):.2f}<small>× smaller at {plots.count(QUOTED)} "
                f"tokens, {report.smaller(r, report.length):.2f}× at "
                f"{plots.count(report.length)}</small>"
            )
        yield (
            f'<section class="card s{index}"><h3>{escape(r.name)} <small>{bits}</small></h3>'
            f'<p class="big">{size}</p>'
            f"<dl><dt>mean KL, nats</dt><dd>{kl_in_words(r.summary.kl.estimate)}</dd>"
            f"<dt>same next token</dt><dd>{r.summary.top1.estimate:.2%}</dd>"
            f"<dt>perplexity</dt><dd>{r.summary.change.estimate:+z.2%}</dd></dl>"
            f'<p><b class="{r.verdict.word}">{word}</b> {_unbroken(r.verdict.reason)}</p></section>'
        )
    yield "</div>"


def _footer(report: Report) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    notes = [
        f"{report.date}, on {report.device}; {versions}",
        f"Command: {report.command_line}",
        f"Weights in {report.quality_dtype}; bytes counted in caches filled in "
        f"{report.kv_bytes_dtype}, with the tables that all caches share; bytes a token at "
        f"{report.length:,} tokens; {report.chunk} tokens per forward pass.",
        "KL is that of the arm's next-token distribution from the exact run's, in nats.",
        f"Verdicts. {RULE}",
        "Read: tokens/s of the windows in chunks; generated: one token at a time.",
    ]
    if report.generated:
        notes.append(
            f"Greedy: {report.generated} tokens after a prompt of {report.prompt:,}. One close "
            "choice that falls the other way parts two texts for good, so this is an anecdote."
        )
    yield from notes_list(notes)


def _unbroken(text: str) -> str:
    """Text whose command line arguments stay on one line."""
    return re.sub(r"--\w+( \d+)?", r"<code>\g<0></code>", escape(text))


def _legend(report: Report, shown: Sequence[int]) -> str:
    items = "".join(
        f'<span class="s{i}"><i></i>{escape(report.results[i].name)}</span>' for i in shown
    )
    return f'<div class="legend">{items}</div>' if items else ""

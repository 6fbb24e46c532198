"""The tables of the page that ``mlx_turboquant compare`` writes."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

from . import plots
from .figures import FLOOR, QUOTED
from .generation import common
from .report import Report, Result, change_in_words
from .tables import Column, table_cells
from .task_results import COLUMNS, by_place, notes
from .worst_tokens import probabilities, shortened


def figures_table(report: Report) -> Iterator[str]:
    """All figures, a row for the exact run and for each arm."""
    columns = [
        Column("arm", "<", lambda r: r.name),
        Column("bits K/V", ">", lambda r: r.bits),
        Column("mean KL, nats", ">", lambda r: kl_in_words(r.summary.kl.estimate)),
        Column("99% KL, nats", ">", lambda r: kl_in_words(r.summary.kl_p99)),
        Column("top-1", ">", lambda r: f"{r.summary.top1.estimate:.2%}"),
        Column("perplexity", ">", lambda r: f"{r.summary.perplexity:.4f}"),
        Column("change [95%]", ">", lambda r: change_in_words(r.summary.change)),
        Column("bytes a token", ">", lambda r: f"{r.kv_bytes_per_token:,.0f}"),
    ]
    columns += [
        Column(
            f"smaller at {plots.count(length)}",
            ">",
            partial(lambda length, r: f"{report.smaller(r, length):.2f}×", length),
        )
        for length in sorted({report.length, QUOTED})
    ]
    columns.append(Column("read, tokens/s", ">", lambda r: f"{r.tokens_per_second:.0f}"))
    if report.generated:
        columns += [
            Column("greedy: same for", ">", lambda r: r.free.same_for if r.free else ""),
            Column("same places", ">", lambda r: f"{r.free.agreement:.0%}" if r.free else ""),
            Column(
                "generated, tokens/s",
                ">",
                lambda r: f"{r.decode_tokens_per_second:.1f}" if r.free else "",
            ),
        ]
    yield "<h2>All figures</h2>"
    yield from _table(columns, report.rows)


def worst_table(report: Report) -> Iterator[str]:
    """The tokens with the largest KL of each arm."""
    rows = [(r.name, token) for r in report.results for token in r.worst]
    if not rows:
        return
    yield "<h2>Tokens with the largest KL</h2>"
    yield from _table(
        [
            Column("arm", "<", lambda row: row[0]),
            Column("KL, nats", ">", lambda row: f"{row[1].kl:.1e}"),
            Column("window, position", ">", lambda row: f"{row[1].window}, {row[1].position}"),
            Column("after", ">", lambda row: shortened(row[1].context)),
            Column("exact says", "<", lambda row: row[1].exact),
            Column("the arm says", "<", lambda row: row[1].said),
            Column("the text says", "<", lambda row: row[1].text or ""),
            Column("the text's probability: exact, arm's", ">", lambda row: probabilities(row[1])),
        ],
        rows,
    )


def task_tables(report: Report) -> Iterator[str]:
    """Right answers to the tasks, and those to passkeys by length and depth."""
    if report.tasks is None:
        return
    yield "<h2>Tasks</h2>"
    yield from _table(COLUMNS, report.tasks.results)
    yield from notes_list(notes(report.tasks))
    yield "<h2>Passkeys by length and depth</h2>"
    passkeys = [cell for cell in report.tasks.cells if cell.task == "passkey"]
    yield from _table(*by_place(passkeys))


def texts(report: Report) -> Iterator[str]:
    """What each run generated; what is no more the exact run's text is marked."""
    if not report.generated:
        return
    yield f"<h2>Greedy texts after {report.prompt:,} tokens</h2>"
    for r in report.spoken:
        text = r.text or ""
        same = common(report.exact.text or "", text)
        yield (
            f"<details><summary>{escape(r.name)}: {_same_for(report, r)}</summary>"
            f"<pre>{escape(text[:same])}<mark>{escape(text[same:])}</mark></pre></details>"
        )


def notes_list(lines: Iterable[str]) -> Iterator[str]:
    """What a reader must know, a line each."""
    yield '<ul class="notes">'
    yield from (f"<li>{escape(line)}</li>" for line in lines)
    yield "</ul>"


def kl_in_words(value: float) -> str:
    """A KL, unless it is rounding."""
    return "rounding" if value <= FLOOR else f"{value:.1e}"


def _same_for(report: Report, r: Result) -> str:
    if r is report.exact or r.free is None:
        return "the text to compare with"
    return f"the same for {r.free.same_for} of {report.generated} tokens"


def _table(columns: Sequence[Column], rows: Sequence[Any]) -> Iterator[str]:
    head, *body = table_cells(columns, rows)
    yield f'<div class="scroll"><table><thead>{_row("th", head)}</thead><tbody>'
    yield from (_row("td", line) for line in body)
    yield "</tbody></table></div>"


def _row(tag: str, line: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>"

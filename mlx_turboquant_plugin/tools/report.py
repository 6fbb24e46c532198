"""What ``mlx_turboquant compare`` found, and how a terminal shows it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import task_results, worst_tokens
from .free_running import Agreement
from .statistics import Interval, Summary, Verdict
from .tables import Column, table
from .task_results import TaskReport
from .worst_tokens import WorstToken

# Besides the length of the windows, sizes are shown at these, in tokens.
SHOWN_LENGTHS = (8192, 32768)


@dataclass(frozen=True)
class Result:
    """One arm against the exact run.

    Attributes:
        bits: of keys and values, in words.
        settings: of the arm, by the names that the plugin or mlx-lm has for them.
        summary: of the same tokens fed to both.
        free: of greedy generation, or None without one.
        verdict: what the sample says.
        kv_bytes_per_token: of all layers at the end of a window, tables included.
        kv_ratio: how many times smaller that is than a KVCache in bfloat16.
        coded_tokens: how many tokens of a window are held as codes at its end.
        tokens_per_second: of the windows, ``decode_tokens_per_second`` of the generation.
        kl_by_position: mean KL of each 64 positions, over the windows.
        bytes_by_length: of all layers, at the report's ``lengths``.
        kl_by_window, change_by_window: what the intervals are made from.
        worst: the tokens with the largest KL; none if nothing is quantized.
        text: what it generated, None without generation.
    """

    name: str
    bits: str
    settings: dict[str, Any]
    summary: Summary
    free: Agreement | None
    verdict: Verdict
    kv_bytes_per_token: float
    kv_ratio: float
    coded_tokens: int
    tokens_per_second: float
    decode_tokens_per_second: float | None
    kl_by_position: list[float]
    bytes_by_length: list[int]
    kl_by_window: list[float]
    change_by_window: list[float]
    worst: list[WorstToken]
    text: str | None


@dataclass(frozen=True)
class Report:
    """A whole comparison.

    Attributes:
        date: when it was finished, with the zone.
        command_line: what was asked for.
        device, versions: as in :class:`Status`.
        exact: the exact run as an arm, with the sizes of a KVCache without spare room.
        notes: what a reader must know of this comparison, a line each.
        interrupted: whether it ended before all was measured; ``missing`` says what was not.
        bf16_by_length: bytes of a KVCache in bfloat16 at ``lengths``.
        kl_by_layer: mean KL with one layer compressed at a time, by ``layer_arm``, in the
            first window; empty if it was not asked for.
        tasks: None if they were not asked for.
    """

    date: str
    command_line: str
    device: str | None
    versions: dict[str, str | None]
    model: str
    source: str
    windows: int
    length: int
    chunk: int
    generated: int
    prompt: int
    quality_dtype: str
    kv_bytes_dtype: str
    exact: Result
    notes: list[str]
    interrupted: bool
    missing: list[str]
    results: list[Result]
    bin: int
    lengths: list[int]
    bf16_by_length: list[int]
    layer_arm: str
    kl_by_layer: list[float]
    tasks: TaskReport | None

    @property
    def rows(self) -> list[Result]:
        """The exact run and all arms."""
        return [self.exact, *self.results]

    @property
    def spoken(self) -> list[Result]:
        """Those of them that have generated."""
        return [row for row in self.rows if row.free]

    def smaller(self, result: Result, length: int) -> float:
        """How many times smaller a cache is than KVCache's in bfloat16, at one of ``lengths``."""
        at = self.lengths.index(length)
        return self.bf16_by_length[at] / result.bytes_by_length[at]


def lines(report: Report) -> Iterator[str]:
    """The lines of the tables for a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"{report.date}, {report.device}; {versions}"
    yield (
        f"{report.model}: {report.windows} x {report.length} tokens of {report.source}, "
        f"in chunks of {report.chunk}, weights in {report.quality_dtype}"
    )
    yield (
        f"smaller: bytes of a sequence, filled in {report.kv_bytes_dtype} up to so many tokens, "
        "and of the tables that all of the model's share, against KVCache's in bfloat16"
    )
    yield from report.notes
    yield ""
    columns: list[Column] = [
        Column("arm", "<", lambda r: r.name),
        Column("bits K/V", ">", lambda r: r.bits),
        Column("mean KL, nats", ">", lambda r: f"{r.summary.kl.estimate:.1e}"),
        Column("99% KL, nats", ">", lambda r: f"{r.summary.kl_p99:.1e}"),
        Column("top-1", ">", lambda r: f"{r.summary.top1.estimate:.2%}"),
        Column("ppl", ">", lambda r: f"{r.summary.perplexity:.4f}"),
        Column("change [95% interval]", ">", lambda r: change_in_words(r.summary.change)),
        Column("read, tokens/s", ">", lambda r: f"{r.tokens_per_second:.0f}"),
    ]
    columns += [
        Column(f"smaller at {length}" if not index else str(length), ">", _smaller(report, length))
        for index, length in enumerate(sorted({report.length, *SHOWN_LENGTHS}))
    ]
    yield from table(columns, report.rows)
    yield ""
    if report.generated:
        yield f"greedy generation of {report.generated} tokens after {report.prompt}"
        columns = [
            Column("arm", "<", lambda r: r.name),
            Column("same for", ">", lambda r: r.free.same_for),
            Column("same places", ">", lambda r: f"{r.free.agreement:.0%}"),
            Column("generated, tokens/s", ">", lambda r: f"{r.decode_tokens_per_second:.1f}"),
        ]
        yield from table(columns, report.spoken)
        yield ""
    columns = [
        Column("arm", "<", lambda r: r.name),
        Column(
            "verdict", "<", lambda r: "no verdict" if r.verdict.word == "none" else r.verdict.word
        ),
        Column("because", "<", lambda r: r.verdict.reason),
    ]
    yield from table(columns, report.results)
    worst = [(result.name, token) for result in report.results for token in result.worst]
    if worst:
        yield ""
        yield from worst_tokens.lines(worst)
    if report.tasks:
        yield ""
        yield from task_results.lines(report.tasks)


def _smaller(report: Report, length: int) -> Callable[[Result], str]:
    return lambda r: f"{report.smaller(r, length):.2f}x"


def change_in_words(change: Interval) -> str:
    """A change of perplexity and its interval."""
    if change.low is None:
        return f"{change.estimate:+z.2%} [too few windows]"
    return f"{change.estimate:+z.2%} [{change.low:+z.2%}, {change.high:+z.2%}]"

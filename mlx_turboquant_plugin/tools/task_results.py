"""How each arm's answers to the tasks compare with the exact run's."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.nn as nn
import numpy as np

from .answering import ORIGINS, Answer, answer
from .arms import EXACT, Arm
from .paired import LEAST_BEYOND_CHANCE, Paired, paired
from .statistics import Interval, interval
from .tables import Column, table
from .tasks import Kind, Prompt

NOTE = (
    "likeliest: the right answer is more probable than all wrong ones; greedy: it is what greedy "
    "generation gives; difference of the shares with Tango's 95% interval; p: McNemar's exact "
    "test, not adjusted for the number of rows; log p: change of the right answer's "
    "log-probability, nats"
)
# Behind right answers that say nothing about caches.
MARK = "*"
NOT_TELLING = (
    f"{MARK} the exact run hardly answers these itself: right in no more than "
    f"{LEAST_BEYOND_CHANCE:.0%} beyond guessing, which says nothing about its cache"
)
ORIGIN_NOTE = (
    "cache: the context was read, or loaded from a file, or reached by trimming what had been read "
    "after it; each beside the exact run's answers after reading"
)


@dataclass(frozen=True)
class TaskResult:
    """One arm's answers to one task, from caches of one origin, beside the exact run's.

    Attributes:
        origin: of the cache, see :mod:`answering`.
        likeliest, greedy: right answers, judged as in :class:`Answer`.
        nats: mean change of the right answer's log-probability.
    """

    task: str
    arm: str
    origin: str
    likeliest: Paired
    greedy: Paired
    nats: Interval

    @property
    def telling(self) -> bool:
        """Whether both judgements say something about the cache."""
        return self.likeliest.telling and self.greedy.telling


@dataclass(frozen=True)
class Cell:
    """Right greedy answers of ``arm`` to one task at one length and depth, of ``count``."""

    task: str
    arm: str
    length: int
    depth: float
    right: int
    count: int


@dataclass(frozen=True)
class TaskReport:
    """All tasks.

    Attributes:
        results: a row for each task, arm and origin of the cache.
        cells: after reading, the exact run's too.
        answers: each single answer, as plain data.
    """

    results: list[TaskResult]
    cells: list[Cell]
    answers: list[dict[str, Any]]


# By arm and origin of the cache.
Answers = dict[str, dict[str, Answer]]


def answers(
    prompts: Iterable[Prompt],
    arms: Sequence[Arm],
    model: nn.Module,
    chunk: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[Kind, Answers]]:
    """What each prompt is, and what the exact run and ``arms`` answer to it."""
    for prompt in prompts:
        yield (
            prompt.kind,
            {arm.name: answer(arm, model, prompt, chunk, progress) for arm in (EXACT, *arms)},
        )


def task_report(arms: Sequence[Arm], found: Sequence[tuple[Kind, Answers]]) -> TaskReport:
    """The answers that :func:`answers` has ``found``, together."""
    names = [EXACT.name, *(arm.name for arm in arms)]
    by_task: dict[str, list[tuple[Kind, Answers]]] = {}
    by_kind: dict[Kind, list[Answers]] = {}
    for kind, given in found:
        by_task.setdefault(kind.task, []).append((kind, given))
        by_kind.setdefault(kind, []).append(given)
    results = [
        _result(task, name, origin, by_task[task])
        for task in by_task
        for name in names[1:]
        for origin in ORIGINS
    ]
    cells = [
        _cell(kind, name, [given[name]["read"] for given in all_given])
        for kind, all_given in by_kind.items()
        for name in names
    ]
    answers = [
        {
            "task": kind.task,
            "length": kind.length,
            "depth": kind.depth,
            "arm": name,
            "cache": origin,
            **asdict(one),
        }
        for kind, given in found
        for name, by_origin in given.items()
        for origin, one in by_origin.items()
    ]
    return TaskReport(results, cells, answers)


def _result(task: str, name: str, origin: str, found: Sequence[tuple[Kind, Answers]]) -> TaskResult:
    ours = [given[name][origin] for _, given in found]
    exact = [given[EXACT.name]["read"] for _, given in found]
    guessed = sum(1 / kind.choices for kind, _ in found) / len(found)
    changes = np.array(
        [(a.nats - b.nats, 1) for a, b in zip(ours, exact, strict=True)], dtype=np.float64
    )
    return TaskResult(
        task,
        name,
        origin,
        paired([a.likeliest for a in ours], [b.likeliest for b in exact], guessed),
        paired([a.greedy for a in ours], [b.greedy for b in exact]),
        interval(changes),
    )


def _cell(kind: Kind, name: str, given: Sequence[Answer]) -> Cell:
    right = sum(one.greedy for one in given)
    return Cell(kind.task, name, kind.length, kind.depth, right, len(given))


COLUMNS = [
    Column("task", "<", lambda r: r.task),
    Column("arm", "<", lambda r: r.arm),
    Column("cache", "<", lambda r: r.origin),
    Column("likeliest", ">", lambda r: _counts(r.likeliest)),
    Column("difference [95%]", ">", lambda r: _difference(r.likeliest)),
    Column("p", ">", lambda r: f"{r.likeliest.p:.2g}"),
    Column("greedy", ">", lambda r: _counts(r.greedy)),
    Column("difference [95%]", ">", lambda r: _difference(r.greedy)),
    Column("p", ">", lambda r: f"{r.greedy.p:.2g}"),
    Column("log p, nats [95%]", ">", lambda r: _nats(r.nats)),
]


def lines(report: TaskReport) -> Iterator[str]:
    """The lines of the table for a terminal."""
    yield "tasks: right answers, and the exact run's of how many"
    yield from table(COLUMNS, report.results)
    yield from notes(report)
    passkeys = [cell for cell in report.cells if cell.task == "passkey"]
    yield ""
    yield "right greedy answers to passkey by length and depth, after reading"
    yield from table(*by_place(passkeys))


def notes(report: TaskReport) -> Iterator[str]:
    """What the table's words and marks mean."""
    yield from (NOTE, ORIGIN_NOTE)
    if not all(result.telling for result in report.results):
        yield NOT_TELLING


def by_place(cells: Sequence[Cell]) -> tuple:
    """Columns, one for each length and depth, and rows, one for each arm, of a table."""
    places = dict.fromkeys((cell.length, cell.depth) for cell in cells)
    rows: dict[str, dict[tuple, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.arm, {})[cell.length, cell.depth] = cell
    columns = [Column("arm", "<", lambda row: next(iter(row.values())).arm)]
    columns += [
        Column(
            f"{length} at {depth:.0%}",
            ">",
            partial(lambda place, row: f"{row[place].right}/{row[place].count}", (length, depth)),
        )
        for length, depth in places
    ]
    return columns, list(rows.values())


def _counts(p: Paired) -> str:
    return f"{p.right}, {p.exact_right} of {p.count}" + MARK * (not p.telling)


def _difference(p: Paired) -> str:
    d = p.difference
    return f"{d.estimate:+z.0%} [{d.low:+z.0%}, {d.high:+z.0%}]"


def _nats(change: Interval) -> str:
    if change.low is None:
        return f"{change.estimate:+z.3f} [too few]"
    return f"{change.estimate:+z.3f} [{change.low:+z.3f}, {change.high:+z.3f}]"

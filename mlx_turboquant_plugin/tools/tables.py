"""Tables of anything, for a terminal and for whatever else shows cells."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A title, how to align it ("<" or ">"), and what to read from a row."""

    title: str
    align: str
    read: Callable[[Any], Any]


def table_cells(columns: Sequence[Column], rows: Sequence[Any]) -> list[list[str]]:
    """The cells, line by line, the titles first."""
    return [
        [column.title for column in columns],
        *([str(column.read(row)) for column in columns] for row in rows),
    ]


def table(columns: Sequence[Column], rows: Sequence[Any]) -> Iterator[str]:
    """The lines of a table for a terminal, as wide as it must be."""
    lines = table_cells(columns, rows)
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    for line in lines:
        yield "  ".join(
            f"{cell:{column.align}{width}}" for cell, column, width in zip(line, columns, widths)
        ).rstrip()

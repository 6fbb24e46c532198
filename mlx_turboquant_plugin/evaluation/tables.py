"""Tables for a terminal."""

from typing import Any, Callable, Iterator, NamedTuple, Sequence


class Column(NamedTuple):
    """A title, how to align it ("<" or ">"), and what to read from a row."""

    title: str
    align: str
    read: Callable[[Any], Any]


def table(columns: Sequence[Column], rows: Sequence[Any]) -> Iterator[str]:
    """The lines of a table, as wide as it must be."""
    shown = [[column.title, *(str(column.read(row)) for row in rows)] for column in columns]
    widths = [max(map(len, cells)) for cells in shown]
    for line in zip(*shown):
        yield "  ".join(
            f"{cell:{column.align}{width}}" for cell, column, width in zip(line, columns, widths)
        ).rstrip()

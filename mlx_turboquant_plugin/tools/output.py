"""What a command shows and writes in the end."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ..rules import SettingsError


def show(lines: Iterable[str], *files: tuple[Path | None, Callable[[], str]]) -> None:
    """Print ``lines`` and write the files: each, whatever becomes of the others.

    Args:
        files: where each goes, None for nowhere, and what makes its text.

    Raises:
        SettingsError: a file can't be written.
    """
    problems = []
    try:
        sys.stdout.write("\n".join(lines) + "\n")
    finally:
        for path, text in files:
            try:
                if path:
                    write(path, text())
            except SettingsError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError("\n".join(problems))


def write(path: Path, text: str) -> None:
    """Write a file in UTF-8.

    Raises:
        SettingsError: it can't be written.
    """
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise SettingsError(
            f"{str(path)!r} can't be written ({error}): choose another place"
        ) from error


def lacking(done: int, asked: int, what: str) -> list[str]:
    """How many of ``what`` was asked for were not ``done``, in words; nothing if all were."""
    return [f"{asked - done} of {asked} {what}"] if done < asked else []


def interruption(missing: Sequence[str]) -> list[str]:
    """A line about what was asked for and is ``missing`` from a result; none if it is whole."""
    return [f"interrupted: not measured: {'; '.join(missing)}"] if missing else []


def with_notes(notes: Sequence[str], missing: Sequence[str], **measured: Any) -> dict[str, Any]:
    """What was ``measured`` as a JSON file holds it, with what a reader must know of it."""
    return {
        "notes": [*interruption(missing), *notes],
        "interrupted": bool(missing),
        "missing": list(missing),
        **measured,
    }


def check_distinct(**files: str | Path | None) -> None:
    """Raise SettingsError if two options, given by name, have the same file.

    What is no regular file, such as /dev/null or a pipe, several may share.
    """
    given = [(name, Path(path)) for name, path in files.items() if path is not None]
    for (one, first), (other, second) in combinations(given, 2):
        if _same(first, second):
            raise SettingsError(
                f"--{one} is {str(first)!r} and --{other} is {str(second)!r}, the same file, "
                "which one of them would overwrite: name two"
            )


def _same(first: Path, second: Path) -> bool:
    try:
        if first.exists() and second.exists():
            return first.is_file() and first.samefile(second)
        return first.resolve() == second.resolve()
    except OSError:
        # Whoever reads or writes it says what is wrong with a name.
        return False


def as_json(data: Any) -> str:
    """What a JSON file of a command holds; numbers that JSON lacks, such as NaN, are null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

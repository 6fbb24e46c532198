"""What a command shows and writes in the end."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ..rules import SettingsError
from ..settings import CONFIG

# Options that name a file to be written.
OUTPUTS = {"--json", "--html", "--plot"}


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


def check_distinct(model: str | None = None, **files: str | Path | None) -> None:
    """Raise SettingsError if an output, see ``OUTPUTS``, would overwrite what the command has.

    What is no regular file, such as /dev/null or a pipe, several may share.

    Args:
        model: its folder, of whose files an output may be none.
        **files: by the names of their options.
    """
    named = {f"--{name}": path for name, path in files.items()}
    named[CONFIG] = os.environ.get(CONFIG)
    given = [(name, Path(path)) for name, path in named.items() if path]
    for (one, first), (other, second) in combinations(given, 2):
        if {one, other} & OUTPUTS and _same(first, second):
            raise SettingsError(
                f"{one} is {str(first)!r} and {other} is {str(second)!r}, the same file, "
                "which one of them would overwrite: name two"
            )
    for name, path in given:
        if model and name in OUTPUTS and any(_same(path, file) for file in _files(Path(model))):
            raise SettingsError(
                f"{name} is {str(path)!r}, a file of the model in --model {model!r}: name another"
            )


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []


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

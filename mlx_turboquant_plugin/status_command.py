"""``mlx_turboquant status``: what an mlx_lm run in this environment would do."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from . import activation, hooking, log, settings, startup
from .reporting import Status, status

CONSISTENT, NOT_IN_FORCE, BAD_SETTINGS = 0, 1, 2
NO_CACHE = (
    "but not in mlx_lm.perplexity, which makes no cache and gives the same as without: measure "
    "with mlx_turboquant compare"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Activate as an mlx_lm run would here, and say what came of it.

    Returns:
        0 if what was asked for is in force (also if nothing was asked for), 1 if it
        is not, 2 if the settings are wrong.
    """
    problems = _import_what_a_run_imports()
    snapshot = status()
    if args.json:
        report = {**snapshot.as_dict(), "import_errors": problems}
        text = json.dumps(report, indent=2)
    else:
        text = "\n".join([*_lines(snapshot), *problems])
    sys.stdout.write(text + "\n")
    if snapshot.settings_error:
        return BAD_SETTINGS
    asked = os.environ.get(settings.SWITCH) == "1"
    failed = any(h["outcome"].startswith("failed") for h in snapshot.hooks)
    if asked and (not snapshot.active or failed or problems):
        return NOT_IN_FORCE
    return CONSISTENT


def _import_what_a_run_imports() -> list[str]:
    """Import mlx and, if TurboQuant waits for it, mlx_lm; say what failed."""
    problems: list[str] = []

    def attempt(name: str) -> None:
        try:
            importlib.import_module(name)
        except ImportError as error:
            problems.append(f"{name} can't be imported: {error}")

    with log.unheard():  # An error that is logged is in the report, too.
        attempt("mlx.core")
        if startup.waiting():
            attempt(startup.TARGET)
            for hook in hooking.hooks():
                if hook.module != activation.OUTSIDE:
                    attempt(hook.module)
    return problems


def _lines(snapshot: Status) -> Iterator[str]:
    """The snapshot as text."""
    yield "TurboQuant is active" if snapshot.active else "TurboQuant is off"
    if snapshot.reason:
        yield f"  because {snapshot.reason}"
    if snapshot.settings_error and snapshot.settings_error != snapshot.reason:
        yield f"  bad settings: {snapshot.settings_error}"
    if snapshot.active:
        yield f"  {NO_CACHE}"
    yield from _section("versions", snapshot.versions)
    yield from _section(
        "kernels",
        {
            "device": snapshot.device,
            "available": snapshot.kernels and ", ".join(snapshot.kernels),
            "chosen": snapshot.kernel_in_words,
        },
    )
    yield from _section("fallbacks", dict.fromkeys(snapshot.fallbacks, ""))
    hooks = [(h["module"], (h["function"], h["outcome"])) for h in snapshot.hooks]
    yield from _section("hooks", {row: outcome for row, (_, outcome) in _together(hooks)})
    patched = [(name, name.rpartition(".")[2]) for name in snapshot.patched]
    yield from _section("patched", {row: "" for row, _ in _together(patched)})
    yield from _section("models", dict.fromkeys(snapshot.models, ""))
    if snapshot.settings:
        yield from _section("settings", _sourced(snapshot.settings))
        for pattern, table in snapshot.model_settings.items():
            different = {n: v for n, v in table.items() if v != snapshot.settings[n]}
            yield from _section(f'settings of models like "{pattern}"', _sourced(different))


def _together(named: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The names of the same kind in one row, each with its kind."""
    kinds: dict[Any, list[str]] = {}
    for name, kind in named:
        kinds.setdefault(kind, []).append(name)
    for kind, (first, *others) in kinds.items():
        yield f"{first} and {len(others)} others like it" if others else first, kind


def _section(title: str, rows: dict[str, Any]) -> Iterator[str]:
    if not rows:
        return
    width = max(map(len, rows))
    yield f"{title}:"
    for name, value in rows.items():
        yield f"  {name:{width}}  {value}".rstrip()


def _sourced(table: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: f"{row['value']}  ({row['source']})" for name, row in table.items()}

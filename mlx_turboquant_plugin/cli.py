"""The command ``mlx_turboquant``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``; only
the one that is asked for is imported.
"""

import argparse
import io
import os
import shlex
import sys
from importlib import import_module

from . import __version__, log
from .rules import SettingsError

# Subcommand -> module, what it does.
COMMANDS = {
    "status": ("status_command", "say whether compression is on, and why"),
    "demo": ("tools.demo", "generate with and without compression, side by side"),
    "estimate": ("tools.estimate", "say what fits into a memory, from a model's config.json"),
    "compare": ("tools.compare", "measure what each preset costs and saves on a model"),
    "drift": ("tools.drift", "measure which layers and heads lose how much"),
    "truncate": ("tools.truncate", "cut a cache, continue, and compare with an uncut run"),
    "bench": ("tools.bench", "measure speed and memory against mlx-lm's own KV cache"),
    "selftest": ("tools.selftest", "check the kernels of this device"),
}
# The module that says how far they are.
PROGRESS = f"{__package__}.tools.progress"
BAD_SETTINGS = 2
# What a shell says of a program that Ctrl-C, or a closed pipe, has ended.
INTERRUPTED, CLOSED = 130, 141


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; the command line's by default.

    Returns:
        The exit code: 2 for bad settings or arguments, 130 after Ctrl-C, 141 if nobody reads
        the output any more, else the subcommand's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Who reads a pipe sees each line at once, and a closed one is found in here.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        return _outcome(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        # Python flushes it once more in the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED


def _outcome(argv: list[str]) -> int:
    try:
        return _run(argv)
    except SettingsError as error:
        log.logger.error("%s", error)
        return BAD_SETTINGS
    except KeyboardInterrupt:
        sys.stdout.write("interrupted: this is what was measured until then\n")
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    _check_working_directory()
    parser = argparse.ArgumentParser(
        prog="mlx_turboquant", description="Compressed KV caches for mlx-lm."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv:
            command_module = import_module(f".{module}", __package__)
            command_module.add_arguments(command)
            command.set_defaults(run=command_module.run)
    args = parser.parse_args(argv)
    args.command_line = shlex.join([parser.prog, *argv])
    with log.shown(PROGRESS):
        return args.run(args)


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise SettingsError("the working directory was deleted: change to another one") from error

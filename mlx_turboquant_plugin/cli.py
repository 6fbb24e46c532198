"""The command ``mlx_turboquant``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``; only
the one that is asked for is imported.
"""

import argparse
import os
import shlex
import sys
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from . import __version__, log, startup
from .interrupts import Terminated, terminable
from .rules import SettingsError
from .stdout import Output, Unwritable

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
# What sysexits.h says of output that fails; what a shell says of a program that Ctrl-C, a closed
# pipe or SIGTERM has ended.
UNWRITABLE, INTERRUPTED, CLOSED, TERMINATED = 74, 130, 141, 143


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; the command line's by default.

    Returns:
        The exit code: 2 for bad settings or arguments, 74 if standard output can't be written,
        130 after Ctrl-C, 141 if nobody reads the output any more, 143 after SIGTERM, else the
        subcommand's.
    """
    output: Any = Output(sys.stdout)
    try:
        with redirect_stdout(output):
            output.flush()  # Nothing is to be measured for an output that is closed.
            code = _outcome(sys.argv[1:] if argv is None else argv, output)
            output.flush()
            return code
    except BrokenPipeError:
        output.give_up()
        return CLOSED
    except Unwritable as error:
        log.logger.error("%s", error)
        output.give_up()
        return UNWRITABLE


def _outcome(argv: list[str], output: Output) -> int:
    try:
        with terminable():
            return _run(argv)
    except SettingsError as error:
        log.logger.error("%s", error)
        return BAD_SETTINGS
    except KeyboardInterrupt as stopped:
        kept = "this is what was measured until then" if output.used else "nothing was measured yet"
        output.write(f"interrupted: {kept}\n")
        return TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED


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
            if module.startswith("tools."):
                # They switch compression on and off themselves, and say what is wrong then.
                startup.withdraw()
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

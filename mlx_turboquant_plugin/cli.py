"""The command ``mlx_turboquant``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``; only
the one that is asked for is imported.
"""

import argparse
import logging
import shlex
import sys
from importlib import import_module
from typing import List, Optional

from . import __version__
from .rules import SettingsError

# Subcommand -> module, what it does.
COMMANDS = {
    "status": ("status_command", "say whether compression is on, and why"),
    "demo": ("evaluation.demo", "generate with and without compression, side by side"),
    "compare": ("evaluation.compare", "measure what each preset costs and saves on a model"),
    "drift": ("evaluation.drift", "measure which layers and heads lose how much"),
    "truncate": ("evaluation.truncate", "cut a cache, continue, and compare with an uncut run"),
    "bench": ("evaluation.bench", "measure speed and memory against mlx-lm's own KV cache"),
    "selftest": ("evaluation.selftest", "check the kernels of this device"),
}
BAD_SETTINGS = 2


def main(argv: Optional[List[str]] = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; the command line's by default.

    Returns:
        The exit code: 2 for bad settings or arguments, else the subcommand's.
    """
    argv = sys.argv[1:] if argv is None else argv
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
    try:
        return args.run(args)
    except SettingsError as error:
        logging.getLogger(__package__).error("%s", error)
        return BAD_SETTINGS

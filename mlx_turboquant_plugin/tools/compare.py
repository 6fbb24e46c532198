"""``mlx_turboquant compare``: what each way to keep keys and values costs and saves.

Every arm reads the same tokens as the exact run (teacher forcing), so that differences
add up over positions instead of sending the texts apart; a greedy generation, where they
may part, is shown beside it.
"""

import argparse
from dataclasses import asdict

from ..activation import disable
from ..interrupts import uninterrupted
from ..rules import PRESETS, SettingsError
from .arguments import (
    Distinct,
    add_json_argument,
    add_text_arguments,
    at_least,
    output_file,
)
from .arms import BESIDE
from .comparison import Comparison
from .output import as_json, check_distinct, show
from .page import page
from .report import lines
from .statistics import RULE
from .tasks import DEEPEST, depth

# Prompts of each task and length: their answers are as good as sure with fewer.
MOST_PROMPTS = 1000
# What --tasks leaves to these options.
TASK_DEFAULTS = {"task_lengths": [1024, 2048], "depths": [0.0, 0.25, 0.5, 0.75]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_text_arguments(parser, windows=6)
    parser.epilog = f"Verdicts. {RULE}"
    parser.add_argument(
        "--presets",
        action=Distinct,
        nargs="+",
        metavar="NAME",
        choices=list(PRESETS),
        default=list(PRESETS),
        help=f"some of {', '.join(PRESETS)} (all)",
    )
    parser.add_argument(
        "--beside",
        action=Distinct,
        nargs="*",
        metavar="NAME",
        choices=list(BESIDE),
        default=["identity", "mlx-lm-4bit", "mlx-lm-8bit"],
        help=f"what else to measure, bypasses and mlx-lm's own quantized caches: some of "
        f"{', '.join(BESIDE)} (all but bridge)",
    )
    parser.add_argument(
        "--generate",
        type=at_least(0),
        metavar="N",
        default=256,
        help="tokens to generate greedily (256); 0 leaves it out",
    )
    parser.add_argument(
        "--tasks",
        type=at_least(0, MOST_PROMPTS),
        metavar="N",
        default=0,
        help="retrieval and tracking with known answers: prompts of each task and length (0)",
    )
    parser.add_argument(
        "--task-lengths",
        action=Distinct,
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="tokens of these prompts (1024 2048)",
    )
    parser.add_argument(
        "--depths",
        action=Distinct,
        type=depth,
        nargs="+",
        metavar="SHARE",
        help=f"where in a prompt the answer is, taken in turn, 0 to {DEEPEST} (0 0.25 0.5 0.75)",
    )
    add_json_argument(parser)
    parser.add_argument(
        "--html", type=output_file("html"), metavar="FILE", help="write a page with plots"
    )


def run(args: argparse.Namespace) -> int:
    """Measure every arm and print a table.

    Returns:
        0; what is wrong with the arguments is raised as SettingsError.
    """
    check_distinct(args.model, json=args.json, html=args.html, text=args.text, tokens=args.tokens)
    _complete_tasks(args)
    disable()  # TURBOQUANT=1 would compress the exact run too
    comparison = Comparison(args)
    try:
        comparison.measure()
    finally:
        # Whatever has failed, and after Ctrl-C, what was measured before counts.
        if comparison.parts:
            with uninterrupted():
                report = comparison.report()
                show(
                    lines(report),
                    (args.json, lambda: as_json(asdict(report))),
                    (args.html, lambda: page(report)),
                )
    return 0


def _complete_tasks(args: argparse.Namespace) -> None:
    for name, default in TASK_DEFAULTS.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default)
        elif not args.tasks:
            option = f"--{name.replace('_', '-')}"
            raise SettingsError(
                f"{option} is {' '.join(map(str, given))}, and no tasks are asked for: it needs "
                "--tasks N"
            )

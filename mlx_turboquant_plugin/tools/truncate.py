"""``mlx_turboquant truncate``: cut a cache, continue, and compare with an uncut run.

Each cut run reads some wrong tokens too many, trims them off again, and reads on; the
reference run never saw them. A cut of up to 16 tokens must leave no trace. A longer one
reaches tokens whose full-precision vectors are gone: queries read them as codes where the
reference reads them exactly, until the window has moved past the cut. Nothing else may
differ: the codes of the kept tokens are the same.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..activation import disable
from ..cache.parts import only_compressed
from ..interrupts import uninterrupted
from ..rules import SettingsError
from .arguments import (
    Distinct,
    add_json_argument,
    add_preset_argument,
    add_text_arguments,
    at_least,
    read_windows,
)
from .arms import PRESET_ARMS, Arm, Run, not_measured
from .output import as_json, check_distinct, lacking, show, with_notes
from .progress import progress
from .runs import load_model
from .teacher_forcing import lockstep

# Tokens that are read after a cut: as many as a window takes to move past it, and some.
CONTINUED = 320
# Chunks of other sizes round differently, and a code at a threshold may fall either way.
SAME_KL = 1e-6
SAME_CODES = 0.9999


@dataclass(frozen=True)
class Cut:
    """One cut.

    Attributes:
        at: tokens kept.
        removed: tokens trimmed off.
        recoded: how many kept tokens the next query reads as codes that the reference
            reads exactly.
        kl: mean KL(reference || cut run) of the positions after the cut, nats.
        top1: share of these positions at which both rank the same token first.
        same_codes: share of bytes of the kept tokens' codes, scales included, that are equal.
        outcome: equal, explained or differs.
    """

    at: int
    removed: int
    recoded: int
    kl: float
    top1: float
    same_codes: float
    outcome: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_text_arguments(parser, windows=1)
    add_preset_argument(parser)
    parser.add_argument(
        "--at",
        action=Distinct,
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="tokens to keep (some places)",
    )
    parser.add_argument(
        "--remove",
        action=Distinct,
        type=at_least(1),
        nargs="+",
        metavar="N",
        default=[1, 16, 17, 300],
        help="tokens to trim off at each place (1 16 17 300)",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Cut at every place and print a table.

    Returns:
        0 if every difference is explained, else 1; what is wrong with the arguments is
        raised as SettingsError.
    """
    check_distinct(args.model, json=args.json, text=args.text, tokens=args.tokens)
    disable()  # The arms switch it on.
    loaded, arm = load_model(args.model, args.tokens is None), PRESET_ARMS[args.preset]
    model = loaded.model
    windows = read_windows(args, model, loaded.tokenizer)
    notes = not_measured(model, arm.settings)
    notes += loaded.beyond_context(args.length, "--length has")
    places = args.at or _places(args.length, max(args.remove))
    if max(places) + max(args.remove) > args.length:
        raise SettingsError(
            f"--at {max(places)} and --remove {max(args.remove)} reach beyond --length "
            f"{args.length}: choose smaller ones, or a longer window"
        )
    model.set_dtype(mx.float32)
    cuts: list[Cut] = []
    asked = len(windows) * len(places) * len(args.remove)
    try:
        with progress(asked, "cuts") as bar:
            for window, at in itertools.product(windows, places):
                for one in cut(model, mx.array(window), args.chunk, arm, at, args.remove):
                    cuts.append(one)
                    bar.update()
    finally:
        # Also after Ctrl-C.
        if cuts:
            with uninterrupted():
                report = with_notes(
                    notes,
                    lacking(len(cuts), asked, "cuts"),
                    preset=args.preset,
                    settings=arm.described,
                    cuts=[asdict(c) for c in cuts],
                )
                show(_lines(args, report["notes"], cuts), (args.json, lambda: as_json(report)))
    return int(any(c.outcome == "differs" for c in cuts))


def cut(
    model: nn.Module, tokens: mx.array, chunk: int, arm: Arm, at: int, remove: Sequence[int]
) -> Iterator[Cut]:
    """Read more than ``at`` of ``tokens`` (L,), trim back to ``at``, read on and compare.

    Args:
        remove: how many tokens to read too many: a cut for each.

    Raises:
        SettingsError: the model can't be compressed.
    """
    uncut = Run(arm, model)
    uncut.read(tokens[:at], chunk)
    rest = tokens[at : at + CONTINUED]
    for removed in remove:
        reference, other = uncut.fork(), Run(arm, model)
        # The tokens that go are others than those that take their place.
        other.read(mx.concatenate([tokens[:at], tokens[at : at + removed][::-1]]), chunk)
        for cache in other.caches:
            cache.trim(removed)
        recoded = _recoded(reference.caches, other.caches)
        [part] = lockstep(reference, [other], rest, chunk)
        same = _same_codes(reference.caches, other.caches, at)
        outcome = "differs"
        if same >= SAME_CODES and (part.kl <= SAME_KL or recoded):
            outcome = "equal" if part.kl <= SAME_KL else "explained"
        yield Cut(at, removed, recoded, part.kl, part.top1, same, outcome)


def _places(length: int, removed: int) -> list[int]:
    """Some places that are no multiples of anything, up to where ``removed`` tokens fit."""
    last = length - max(removed, CONTINUED)
    if last < 1:
        raise SettingsError(
            f"--length is {length}, which leaves no place to cut {removed} tokens off: "
            "choose a longer window or a smaller --remove"
        )
    return sorted({max(1, int(last * share)) for share in (0.07, 0.31, 0.59, 0.97)})


def _recoded(reference: list[Any], other: list[Any]) -> int:
    """Tokens that the next query reads as codes in ``other`` and exactly in ``reference``."""
    first, second = only_compressed(reference)[0], only_compressed(other)[0]
    full_from = first.visibility.full_from(first.offset)
    return max(0, second.full_start - max(full_from, first.full_start))


def _same_codes(reference: list[Any], other: list[Any], at: int) -> float:
    """The share of equal bytes among the codes of the first ``at`` tokens of both."""
    equal = total = 0
    for a, b in zip(only_compressed(reference), only_compressed(other)):
        kept = range(min(at, a.quantized, b.quantized))
        for one, two, axis in (
            *((x, y, -1) for x, y in zip(a.key_codes, b.key_codes)),
            *((x, y, -2) for x, y in zip(a.value_codes, b.value_codes)),
        ):
            ours, theirs = (np.array(x).take(kept, axis=axis) for x in (one, two))
            equal += int((ours == theirs).sum())
            total += ours.size
    return equal / total if total else 1.0


def _lines(args: argparse.Namespace, notes: list[str], cuts: list[Cut]) -> Iterator[str]:
    yield (
        f"{args.model}, preset {args.preset}: cut, continued by {CONTINUED} tokens and "
        "compared with the run that was not cut, weights in float32"
    )
    yield from notes
    yield ""
    yield (
        f"{'kept':>6} {'removed':>8} {'as codes':>9} {'mean KL, nats':>14} {'top-1':>8} "
        f"{'same codes':>11}  outcome"
    )
    for c in cuts:
        yield (
            f"{c.at:>6} {c.removed:>8} {c.recoded:>9} {c.kl:>14.1e} {c.top1:>8.2%} "
            f"{c.same_codes:>11.4%}  {c.outcome}"
        )
    yield ""
    yield (
        "as codes: kept tokens whose full-precision vectors went before the cut; the next tokens "
        "read them as codes, which explains a difference"
    )

"""``mlx_turboquant selftest``: every kernel of this device against NumPy in fp64.

In the manner of llama.cpp's test-backend-ops: a table of shapes, codecs and dtypes, one
line each, of which ``--quick`` takes a few lines and ``--all`` those, too, whose kernels a GPU
has to compile for minutes. A case fills real caches with a prompt, and lets mlx-lm's patched
attention answer the next queries, of decoding or of another part of a prompt. The
expected result is computed from the codes that the caches hold, by what ``reference.py``
says they mean, so that it judges attention and not the loss of the codecs. The codes are
judged apart: no vector may lose much more in them than in those of ``reference.py``.

What counts as an error is derived in :mod:`checked_layer`.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .. import compiling
from ..attention.fused import fallbacks_heard
from ..backends import available_kernels, fused_kernels
from ..backends.choice import resolve_kernel
from ..rules import KERNELS
from .cases import QUICK, Case, table
from .checked_layer import CheckedLayer

# That compile at the same time, on a GPU.
PROCESSES = 4


class Result(NamedTuple):
    """What came of a case: ``note`` says why it failed, if not by its error."""

    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        # NaN is not.
        return not self.note and self.error <= self.tolerance


def check(tested: Case, kernel: str) -> Result:
    """Run one case with the kernel of the given name."""
    layer = CheckedLayer(tested, kernel)
    try:
        with fallbacks_heard() as notes:
            out = np.array(layer.attend().astype(mx.float32))
    except Exception as error:  # A kernel may fail to compile: the others are still checked.
        return Result(np.inf, 0.0, f"{type(error).__name__}: {error}")
    excess = layer.excess()
    if not excess <= 1:
        notes.append(f"codes lose {excess:.3g} times what they may")
    if not layer.holds_what_was_given():
        notes.append("exact tokens are not those that were given")
    expected, tolerance = layer.expected()
    largest = np.abs(out - expected).max()
    return Result(float(largest), tolerance, "; ".join(notes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--kernel", choices=KERNELS, help="only this one (default: all that this device can run)"
    )
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--quick", action="store_true", help="a few cases")
    shapes.add_argument(
        "--all", action="store_true", help="more cases; a GPU compiles their kernels for minutes"
    )


def run(args: argparse.Namespace) -> int:
    """Check and print.

    Returns:
        0 if all is right, 1 if anything is not.
    """
    kernels = [resolve_kernel(args.kernel, "--kernel")] if args.kernel else available_kernels()
    if not fused_kernels():
        sys.stdout.write(
            f"no fused kernel runs on {mx.default_device()}; checking {' and '.join(kernels)}\n"
        )
    if "compiled" in kernels and compiling.problem():
        sys.stdout.write(f"compiled: {compiling.problem()}\n")
    failed, total = 0, 0
    try:
        for kernel in kernels:
            cases = QUICK if args.quick else list(table(args.all))
            for tested, result in zip(cases, _results(cases, kernel)):
                total, failed = total + 1, failed + (not result.ok)
                sys.stdout.write(_line(kernel, tested, result) + "\n")
    finally:
        # Also after Ctrl-C.
        if total:
            sys.stdout.write(f"{total - failed} of {total} OK\n")
    return 1 if failed else 0


def _results(cases: Sequence[Case], kernel: str) -> Iterator[Result]:
    """What comes of each case, in their order.

    On a GPU nearly all the time goes into compiling kernels, one at a time in a process.
    """
    if mx.default_device().type != mx.gpu:
        yield from (check(tested, kernel) for tested in cases)
        return
    # Ctrl-C ends these processes, too, and one traceback each would be too many.
    quiet = signal.signal, (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn"), *quiet) as pool:
        yield from pool.map(check, cases, repeat(kernel))


def _line(kernel: str, tested: Case, result: Result) -> str:
    verdict = "OK" if result.ok else f"FAIL {result.note}".rstrip()
    return f"{kernel:8} {tested!s:60} error {result.error:.1e} of {result.tolerance:.1e}  {verdict}"

"""The command line of ``mlx_turboquant bench``."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ... import compiling, settings
from ...activation import disable
from ...attention.fused import fallbacks_heard
from ...backends.choice import kernel_of, resolve_kernel
from ...interrupts import uninterrupted
from ...reporting import status
from ...rules import KERNELS, SettingsError
from ..arguments import Distinct, at_least, output_file
from ..arms import not_measured
from ..demo import MODEL
from ..output import check_distinct, show, write
from ..progress import progress
from ..runs import dtype_name, load_model, prompt_cache
from .layer import Layer, LayerBench
from .measurement import ROUND, Results
from .model import ModelBench
from .plot import picture
from .report import lines
from .saved import resume, saved
from .shapes import SHAPES, random_model

PARTS = ("layer", "decode", "prefill")
GPU = mx.default_device().type == mx.gpu
# What is measured where the arguments don't say; the chunk on GPUs is mlx-lm's.
FULL = {
    "lengths": [1024, 4096, 16384],
    "prompts": [8192, 32768] if GPU else [2048, 4096],
}
QUICK = {"lengths": [1024, 4096], "prompts": [8192] if GPU else [1024]}
CHUNK = 2048 if GPU else 512
DTYPES = {dtype_name(dtype): dtype for dtype in (mx.float32, mx.float16, mx.bfloat16)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    number = at_least(1)
    dtypes = ["float16", "bfloat16"] if GPU else ["float32", "float16"]
    parser.add_argument(
        "--parts",
        action=Distinct,
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure (all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two minutes: fewer --lengths and --prompts, where these are not given",
    )
    parser.add_argument(
        "--lengths",
        type=number,
        action=Distinct,
        nargs="+",
        metavar="TOKENS",
        help=f"in the cache, of layer and decode ({_default('lengths')})",
    )
    parser.add_argument(
        "--batch",
        type=number,
        action=Distinct,
        nargs="+",
        default=[1],
        metavar="ROWS",
        help="sequences at a time; prompts of several are ragged (1)",
    )
    parser.add_argument(
        "--prompts",
        type=number,
        action=Distinct,
        nargs="+",
        metavar="TOKENS",
        help=f"of prefill, the longest of a batch ({_default('prompts')})",
    )
    parser.add_argument(
        "--chunk", type=number, default=CHUNK, help="tokens of a prefill step (%(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=number,
        default=3,
        help=f"turns of each cache: {ROUND} steps, or a prompt (3)",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", default=str(MODEL), help="folder or Hub name (default: a tiny model, shipped)"
    )
    model.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument(
        "--heads",
        type=number,
        nargs=2,
        default=[8, 2],
        metavar=("QUERY", "KV"),
        help="of the layer (8 2)",
    )
    parser.add_argument("--head-dim", type=number, default=128, help="of the layer (128)")
    parser.add_argument(
        "--layers",
        type=number,
        default=16 if GPU else 4,
        help="used in turn, and in a chain on a GPU (%(default)s)",
    )
    parser.add_argument(
        "--dtypes",
        action=Distinct,
        nargs="+",
        choices=list(DTYPES),
        default=dtypes,
        help=f"of the layer ({' '.join(dtypes)})",
    )
    parser.add_argument(
        "--model-dtype", choices=list(DTYPES), help="of the model (default: as it is stored)"
    )
    parser.add_argument(
        "--kv-bits", type=int, choices=(2, 3, 4, 6, 8), default=4, help="of QuantizedKVCache (4)"
    )
    parser.add_argument(
        "--kernel",
        choices=KERNELS,
        help="of the compressed cache (default: what TURBOQUANT_KERNEL says, or auto)",
    )
    parser.add_argument(
        "--json",
        type=output_file("json"),
        metavar="FILE",
        help="write all figures, those of each situation as soon as it is measured",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what --json holds from an earlier run with the same arguments",
    )
    parser.add_argument(
        "--plot", type=output_file("svg"), metavar="FILE", help="draw speed and memory, an SVG"
    )


def _default(name: str) -> str:
    return "; quick: ".join(" ".join(map(str, each[name])) for each in (FULL, QUICK))


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        0. Before Ctrl-C or an error is passed on, what was measured until then is shown. Bad
        settings and models that can't be measured are raised as SettingsError.
    """
    check_distinct(args.model, json=args.json, plot=args.plot)
    overrides: dict[str, Any] = {}
    if args.kernel:
        overrides["kernel"] = resolve_kernel(args.kernel, "--kernel")
    chosen = settings.load(overrides=overrides).general
    if chosen.bypass:
        raise SettingsError(
            f"TURBOQUANT_BYPASS is {chosen.bypass!r}: bench measures compression, which that "
            "leaves out: unset it"
        )
    disable()  # TURBOQUANT=1 would compress every cache
    compiling.here()
    if args.heads[0] % args.heads[1]:
        raise SettingsError(
            f"--heads is {args.heads[0]} {args.heads[1]}: the query heads must be a multiple "
            "of the KV heads"
        )
    if "layer" in args.parts:
        _check_bits(chosen)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    notes = _notes(args, chosen)
    if args.resume and not args.json:
        raise SettingsError("--resume needs --json FILE, from which it goes on: name it")
    results = resume(args.json, notes) if args.resume else Results()
    with fallbacks_heard() as notes["fallbacks"]:
        try:
            _measure(args, chosen, overrides, notes, results)
        finally:
            # Whatever has failed, what was measured before counts.
            if results.measurements or results.skipped:
                with uninterrupted():
                    show(
                        lines(notes, results),
                        (args.json, lambda: saved(notes, results)),
                        (args.plot, lambda: picture(notes, results)),
                    )
    return 0


class Job(NamedTuple):
    """A row of the table: ``run(tick)`` calls ``tick`` as often as ``ticks`` says."""

    title: str
    ticks: int
    run: Callable[[Callable], None]


def _measure(
    args: argparse.Namespace,
    chosen: settings.Settings,
    overrides: dict[str, Any],
    notes: dict[str, Any],
    results: Results,
) -> None:
    jobs: list[Job] = []
    if {"decode", "prefill"} & set(args.parts):
        model = random_model(args.shape) if args.shape else load_model(args.model, False).model
        if args.model_dtype:
            model.set_dtype(DTYPES[args.model_dtype])
            mx.eval(model.parameters())
        # Where these come from nobody would know any more.
        chosen.for_layers(len(prompt_cache(model)))
        # What the notes say, and no table of the settings file for this model.
        shaping = {"preset": chosen.preset, **chosen.shaping}
        notes["remarks"] += not_measured(model, shaping)
        bench = ModelBench(model, args.kv_bits, {**shaping, **overrides})
        jobs += _model_jobs(args, bench, results)
    if "layer" in args.parts:
        jobs += _layer_jobs(args, chosen, results)
    results.asked = [job.title for job in jobs]
    jobs = [job for job in jobs if job.title not in results.done]
    with progress(sum(job.ticks for job in jobs), "turns") as bar:
        for job in jobs:
            bar.set_description(job.title, refresh=False)
            job.run(bar.update)
            results.finish(job.title)
            if args.json and (args.json.is_file() or not args.json.exists()):
                # A process that is killed shows nothing in the end. No pipe is written twice.
                write(args.json, saved(notes, results))


def _layer_jobs(args: argparse.Namespace, chosen: settings.Settings, results: Results) -> list[Job]:
    bench = LayerBench(
        Layer(args.heads[0], args.heads[1], args.head_dim), chosen, args.layers, args.kv_bits, GPU
    )
    return [
        Job(
            f"layer, {dtype}, batch {batch}, {tokens} tokens",
            args.rounds * ROUND * (1 + GPU),
            partial(bench.measure, results, tokens, batch, DTYPES[dtype], args.rounds),
        )
        for dtype in args.dtypes
        for batch in args.batch
        for tokens in args.lengths
    ]


def _model_jobs(args: argparse.Namespace, bench: ModelBench, results: Results) -> list[Job]:
    jobs = []
    # Before all others: its first times are to be those of a new process.
    if "prefill" in args.parts:
        jobs += [
            Job(
                f"prefill, batch {batch}, {tokens} tokens",
                args.rounds + 1,
                partial(bench.prefill, results, tokens, batch, args.chunk, args.rounds),
            )
            for batch in args.batch
            for tokens in args.prompts
        ]
    if "decode" in args.parts:
        jobs += [
            Job(
                f"decode, batch {batch}, {tokens} tokens",
                args.rounds,
                partial(bench.decode, results, tokens, batch, args.rounds),
            )
            for batch in args.batch
            for tokens in args.lengths
        ]
    return jobs


def _notes(args: argparse.Namespace, chosen: settings.Settings) -> dict[str, Any]:
    """What the figures depend on."""
    state = status()
    query, kv = args.heads
    return {
        "versions": state.versions,
        "device": state.device,
        "kernel": kernel_of(chosen),
        **chosen.shaping,
        "invariant": chosen.invariant,
        "remarks": [f"in force: {words}"] if (words := chosen.shaped_by()) else [],
        "kv_bits": args.kv_bits,
        "layer": f"{query} query and {kv} KV heads of {args.head_dim}",
        "layers": args.layers,
        "model": f"random weights, {args.shape}" if args.shape else args.model,
        "chunk": args.chunk,
        "model_dtype": args.model_dtype,
        "rounds": args.rounds,
    }


def _check_bits(chosen: settings.Settings) -> None:
    for name in ("key_bits", "value_bits"):
        bits = getattr(chosen, name)
        if isinstance(bits, tuple):
            raise SettingsError(
                f"{name} ({chosen.source(name)}) is {','.join(map(str, bits))}, bits by layer, "
                "and the part layer measures a layer of no model: leave it out (--parts decode "
                "prefill), or give one number"
            )

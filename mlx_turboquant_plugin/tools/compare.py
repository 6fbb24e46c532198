"""``mlx_turboquant compare``: what each way to keep keys and values costs and saves.

Every arm reads the same tokens as the exact run (teacher forcing), so that differences
add up over positions instead of sending the texts apart; a greedy generation, where they
may part, is shown beside it.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import mlx.core as mx
import numpy as np

from ..activation import disable
from ..cache.parts import only_compressed
from ..reporting import status
from ..rules import PRESETS
from .arguments import (
    add_json_argument,
    add_text_arguments,
    as_json,
    at_least,
    output_file,
    read_windows,
    show,
)
from .arms import BESIDE, EXACT, PRESET_ARMS, Arm, Run
from .free_running import Generation, agreement, generate
from .memory import bf16_bytes, bytes_by_length, layer_shapes
from .page import page
from .progress import progress
from .report import Report, Result, lines
from .runs import dtype_name, load_model, prompt_cache, quantized_tokens
from .statistics import RULE, summarize, verdict
from .task_results import Answers, answers, task_report
from .tasks import DEEPEST, depth, prompts
from .teacher_forcing import Divergence, lockstep
from .worst_tokens import worst_tokens

# Positions that one point of a curve by position stands for.
BIN = 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MLX_LM_GROUP = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_text_arguments(parser, windows=6)
    parser.epilog = f"Verdicts. {RULE}"
    parser.add_argument(
        "--presets",
        nargs="+",
        metavar="NAME",
        choices=list(PRESETS),
        default=list(PRESETS),
        help=f"some of {', '.join(PRESETS)} (all)",
    )
    parser.add_argument(
        "--beside",
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
        type=at_least(0),
        metavar="N",
        default=0,
        help="retrieval and tracking with known answers: prompts of each task and length (0)",
    )
    parser.add_argument(
        "--task-lengths",
        type=at_least(1),
        nargs="+",
        metavar="N",
        default=[1024, 2048],
        help="tokens of these prompts (1024 2048)",
    )
    parser.add_argument(
        "--depths",
        type=depth,
        nargs="+",
        metavar="SHARE",
        default=[0.0, 0.25, 0.5, 0.75],
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
    disable()  # TURBOQUANT=1 would compress the exact run too
    comparison = Comparison(args)
    try:
        comparison.measure()
    finally:
        # Whatever has failed, and after Ctrl-C, what was measured before counts.
        if comparison.parts:
            report = comparison.report()
            show(
                lines(report),
                (args.json, lambda: as_json(asdict(report))),
                (args.html, lambda: page(report)),
            )
    return 0


class Comparison:
    """Every arm that ``args`` asks for.

    Attributes:
        parts: the divergences of the arms in each window that all of them have read.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, self.tokenizer = load_model(args.model)
        self.windows = read_windows(args, self.model, self.tokenizer)
        caches = prompt_cache(self.model)
        # Never evaluated: shapes and dtypes are known without.
        self.model(mx.zeros((1, 1), mx.int32), cache=caches)
        self.dtype, self.shapes = caches[0].keys.dtype, layer_shapes(caches)
        # A name that is given twice is measured once.
        names = dict.fromkeys(args.presets + args.beside)
        arms = [{**PRESET_ARMS, **BESIDE}[name] for name in names]
        self.arms, self.left_out = applicable(arms, self.shapes)
        self.layer_arm = PRESET_ARMS["default" if "default" in args.presets else args.presets[0]]
        self.prompt = mx.array(self.windows[0][: -(-args.length // 2)])
        self.asked = list(prompts(self.tokenizer, args.tasks, args.task_lengths, args.depths))
        self._lengths = sorted({*LENGTHS, args.length})
        self._sizes = {
            arm.name: bytes_by_length(arm, self.model, self.shapes, self.dtype, self._lengths)
            for arm in self.arms
        }
        self._sizes[EXACT.name] = [bf16_bytes(self.shapes, length) for length in self._lengths]
        self.parts: list[list[Divergence]] = []
        self._runs: list[list[Run]] = []
        self._by_layer: list[float] = []
        self._generations: dict[str, Generation] = {}
        self._answers: list[Answers] = []

    def measure(self) -> None:
        """Read the windows, generate, and answer the tasks: what is done is kept."""
        self.model.set_dtype(mx.float32)
        layers = range(len(self.shapes) if self.args.json or self.args.html else 0)
        with progress(self._total(len(layers)), "tokens") as bar:
            for window in self.windows:
                self._read(mx.array(window), [] if self.parts else layers, bar.update)
            if self.args.generate:
                self._generations = {
                    arm.name: generate(arm, self.model, self.prompt, self.args.generate, bar.update)
                    for arm in (EXACT, *self.arms)
                }
            for found in answers(self.asked, self.arms, self.model, self.args.chunk, bar.update):
                self._answers.append(found)

    def _total(self, layers: int) -> int:
        """All tokens that are read or generated."""
        contexts = sum(prompt.context.size for prompt in self.asked)
        each = self.args.windows * self.args.length + self.args.generate + contexts
        return (len(self.arms) + 1) * each + layers * self.args.length

    def _read(self, window: mx.array, layers: Sequence[int], update: Callable[[int], Any]) -> None:
        runs = [Run(arm, self.model) for arm in (EXACT, *self.arms)]
        extra = [Run(self.layer_arm.only(i), self.model) for i in layers]
        parts = lockstep(runs[0], runs[1:] + extra, window, self.args.chunk, update)
        self._runs.append(runs)
        self._by_layer += [part.kl for part in parts[len(self.arms) :]]
        self.parts.append([parts[0].of_exact(), *parts[: len(self.arms)]])
        # Only the last caches are looked at.
        for past in itertools.chain(*self._runs[:-1]):
            past.caches = []

    def report(self) -> Report:
        """What was measured so far: one window at least."""
        args, state = self.args, status()
        exact, *results = (self._result(*each) for each in enumerate((EXACT, *self.arms)))
        asked = self.asked[: len(self._answers)]
        return Report(
            date=datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
            command_line=args.command_line,
            device=state.device,
            versions=state.versions,
            model=args.model,
            source=args.tokens or args.text or "Python's manual (pydoc_data.topics)",
            windows=len(self.parts),
            length=args.length,
            chunk=args.chunk,
            generated=args.generate if self._generations else 0,
            prompt=self.prompt.size,
            quality_dtype="float32",
            kv_bytes_dtype=dtype_name(self.dtype),
            exact=exact,
            left_out=self.left_out,
            results=results,
            bin=BIN,
            lengths=self._lengths,
            layer_arm=self.layer_arm.name,
            kl_by_layer=self._by_layer,
            tasks=task_report(asked, self.arms, self._answers) if asked else None,
        )

    def _result(self, index: int, arm: Arm) -> Result:
        found = [parts[index] for parts in self.parts]
        spoken, said = (self._generations.get(name) for name in (EXACT.name, arm.name))
        at, size = self._lengths.index(self.args.length), self._sizes[arm.name]
        return _result(
            [runs[index] for runs in self._runs],
            found,
            free=agreement(spoken.tokens, said.tokens) if spoken and said else None,
            decode_tokens_per_second=said and said.speed,
            kv_bytes_per_token=size[at] / self.args.length,
            kv_ratio=self._sizes[EXACT.name][at] / size[at],
            bytes_by_length=size,
            worst=worst_tokens(self.tokenizer, self.windows, found) if arm.codes else [],
            text=said and self.tokenizer.decode(said.tokens),
        )


def applicable(arms: Sequence[Arm], shapes: Sequence[Any]):
    """The arms that the head dims allow, and a line about each of the others."""
    odd = sorted({dim for shape in shapes for _, dim in shape if dim % MLX_LM_GROUP})
    kept = [arm for arm in arms if arm.mlx_lm_bits is None or not odd]
    return kept, [
        f"{arm.name} left out: mlx-lm can't quantize head dim {odd[0]} in groups of {MLX_LM_GROUP}"
        for arm in arms
        if arm not in kept
    ]


def _speed(runs: Sequence[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def _result(runs: Sequence[Run], windows: Sequence[Divergence], **others: Any) -> Result:
    arm, caches = runs[0].arm, runs[-1].caches
    summary = summarize(windows)
    kls = np.mean([window.kls for window in windows], axis=0)
    bits, reading = str(arm.mlx_lm_bits or 16), 1.0
    ours = only_compressed(caches)
    if ours and ours[0].codec:
        spec, visibility = ours[0].codec.spec, ours[0].visibility
        bits = f"{spec.key_bits}/{spec.value_bits}" if spec.key_codec != "exact" else "exact"
        reads = [visibility.full_from(p) > visibility.sinks for p in range(len(kls))]
        reading = sum(reads) / len(reads)
    return Result(
        name=arm.name,
        bits=bits,
        summary=summary,
        verdict=verdict(summary, reading),
        coded_tokens=caches[0].offset if arm.mlx_lm_bits else quantized_tokens(caches),
        tokens_per_second=_speed(runs),
        kl_by_position=[float(kls[i : i + BIN].mean()) for i in range(0, len(kls), BIN)],
        kl_by_window=[window.kl for window in windows],
        change_by_window=[w.perplexity / w.exact_perplexity - 1 for w in windows],
        **others,
    )

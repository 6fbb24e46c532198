"""``mlx_turboquant compare``: what each way to keep keys and values costs and saves.

Every arm reads the same tokens as the exact run (teacher forcing), so that differences
add up over positions instead of sending the texts apart; a greedy generation, where they
may part, is shown beside it.
"""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import datetime
from typing import Any, Dict, List, Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..activation import disable
from ..cache import CompressedKVCache
from ..reporting import status
from ..rules import PRESETS
from .arguments import add_text_arguments, at_least, output_file, read_windows, write
from .arms import BESIDE, EXACT, PRESET_ARMS, Arm, Run
from .free_running import agreement, generate
from .memory import bf16_bytes, bytes_by_length, layer_shapes
from .page import page
from .report import Report, Result, lines
from .runs import coded_tokens, load_model, prompt_cache
from .statistics import RULE, summarise, verdict
from .task_results import run_tasks
from .tasks import DEEPEST, Prompt, depth, prompts
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
        "--presets", nargs="+", metavar="NAME", choices=list(PRESETS), default=list(PRESETS),
        help=f"some of {', '.join(PRESETS)} (all)",
    )
    parser.add_argument(
        "--beside", nargs="*", metavar="NAME", choices=list(BESIDE),
        default=["identity", "mlx-lm-4bit", "mlx-lm-8bit"],
        help=f"what else to measure, bypasses and mlx-lm's own quantised caches: some of "
        f"{', '.join(BESIDE)} (all but bridge)",
    )
    parser.add_argument(
        "--generate", type=at_least(0), metavar="N", default=256,
        help="tokens to generate greedily (256); 0 leaves it out",
    )
    parser.add_argument(
        "--tasks", type=at_least(0), metavar="N", default=0,
        help="retrieval and tracking with known answers: prompts of each task and length (0)",
    )
    parser.add_argument(
        "--task-lengths", type=at_least(1), nargs="+", metavar="N", default=[1024, 2048],
        help="tokens of these prompts (1024 2048)",
    )
    parser.add_argument(
        "--depths", type=depth, nargs="+", metavar="SHARE", default=[0.0, 0.25, 0.5, 0.75],
        help=f"where in a prompt the answer is, taken in turn, 0 to {DEEPEST} (0 0.25 0.5 0.75)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write everything that was measured"
    )
    parser.add_argument("--html", type=output_file, metavar="FILE", help="write a page with plots")


def run(args: argparse.Namespace) -> int:
    """Measure every arm and print a table.

    Returns:
        0; what is wrong with the arguments is raised as SettingsError.
    """
    disable()  # TURBOQUANT=1 would compress the exact run too
    report = compare(args)
    sys.stdout.write("\n".join(lines(report)) + "\n")
    if args.json:
        write(args.json, json.dumps(asdict(report), indent=1) + "\n")
    if args.html:
        write(args.html, page(report))
    return 0


def compare(args: argparse.Namespace) -> Report:
    """Measure every arm that ``args`` asks for."""
    model, tokenizer = load_model(args.model)
    windows = read_windows(args, model, tokenizer)
    caches = prompt_cache(model)
    # Never evaluated: shapes and dtypes are known without.
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    dtype, shapes = caches[0].keys.dtype, layer_shapes(caches)
    # A name that is given twice is measured once.
    arms = [{**PRESET_ARMS, **BESIDE}[name] for name in dict.fromkeys(args.presets + args.beside)]
    arms, left_out = applicable(arms, shapes)
    lengths = sorted({*LENGTHS, args.length})
    sizes = {arm.name: bytes_by_length(arm, model, shapes, dtype, lengths) for arm in arms}
    model.set_dtype(mx.float32)
    asked = list(prompts(tokenizer, args.tasks, args.task_lengths, args.depths))
    layers = range(len(shapes) if args.json or args.html else 0)
    layer_arm = PRESET_ARMS["default" if "default" in args.presets else args.presets[0]]
    prompt = mx.array(windows[0][: -(-args.length // 2)])
    with _progress(args, len(arms), len(layers), asked) as progress:
        generations = {
            arm.name: generate(arm, model, prompt, args.generate, progress)
            for arm in ([EXACT, *arms] if args.generate else [])
        }
        exact = [Run(EXACT, model) for _ in windows]
        runs: Dict[str, List[Run]] = {arm.name: [] for arm in arms}
        found: Dict[str, List[Divergence]] = {arm.name: [] for arm in arms}
        by_layer: List[float] = []
        for index, window in enumerate(windows):
            now = [Run(arm, model) for arm in arms]
            extra = [Run(layer_arm.only(i), model) for i in layers] if index == 0 else []
            parts = lockstep(exact[index], now + extra, mx.array(window), args.chunk, progress)
            for arm, one_run, part in zip(arms, now, parts):
                runs[arm.name].append(one_run)
                found[arm.name].append(part)
            by_layer += [part.kl for part in parts[len(arms) :]]
            if index:
                # Only the last caches are looked at.
                for past in [exact[index - 1], *(done[index - 1] for done in runs.values())]:
                    past.caches = []
        tasks = run_tasks(asked, arms, model, args.chunk, progress) if asked else None
    spoken = generations.get(EXACT.name)
    state = status()
    at = lengths.index(args.length)
    sizes[EXACT.name] = [bf16_bytes(shapes, length) for length in lengths]
    runs[EXACT.name] = exact
    found[EXACT.name] = [part.of_exact() for part in found[arms[0].name]]
    results = []
    for arm in (EXACT, *arms):
        said, size = generations.get(arm.name), sizes[arm.name]
        results.append(
            _result(
                runs[arm.name],
                found[arm.name],
                free=said and agreement(spoken.tokens, said.tokens),
                decode_tokens_per_second=said and said.speed,
                kv_bytes_per_token=size[at] / args.length,
                kv_ratio=sizes[EXACT.name][at] / size[at],
                bytes_by_length=size,
                worst=worst_tokens(tokenizer, windows, found[arm.name]) if arm.codes else [],
                text=said and tokenizer.decode(said.tokens),
            )
        )
    return Report(
        date=datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        command_line=args.command_line,
        device=state.device,
        versions=state.versions,
        model=args.model,
        source=args.tokens or args.text or "Python's manual (pydoc_data.topics)",
        windows=args.windows,
        length=args.length,
        chunk=args.chunk,
        generated=args.generate,
        prompt=prompt.size,
        quality_dtype="float32",
        kv_bytes_dtype=str(dtype).removeprefix("mlx.core."),
        exact=results[0],
        left_out=left_out,
        results=results[1:],
        bin=BIN,
        lengths=lengths,
        layer_arm=layer_arm.name,
        kl_by_layer=by_layer,
        tasks=tasks,
    )


def applicable(arms: Sequence[Arm], shapes: Sequence[Any]):
    """The arms that the head dims allow, and a line about each of the others."""
    odd = sorted({dim for shape in shapes for _, dim in shape if dim % MLX_LM_GROUP})
    kept = [arm for arm in arms if arm.mlx_lm_bits is None or not odd]
    return kept, [
        f"{arm.name} left out: mlx-lm can't quantise head dim {odd[0]} in groups of {MLX_LM_GROUP}"
        for arm in arms
        if arm not in kept
    ]


def _progress(
    args: argparse.Namespace, arms: int, layers: int, asked: Sequence[Prompt]
) -> Any:
    """A progress bar over tokens on a terminal's stderr; calling it adds to what is done."""

    class Bar(tqdm):
        __call__ = tqdm.update

    contexts = sum(prompt.context.size for prompt in asked)
    total = (arms + 1) * (args.windows * args.length + args.generate + contexts)
    total += layers * args.length
    return Bar(total=total, unit=" tokens", unit_scale=True, disable=None, leave=False)


def _speed(runs: Sequence[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def _result(runs: Sequence[Run], windows: Sequence[Divergence], **others: Any) -> Result:
    arm, caches = runs[0].arm, runs[-1].caches
    summary = summarise(windows)
    kls = np.mean([window.kls for window in windows], axis=0)
    bits, coded = str(arm.mlx_lm_bits or 16), 1.0
    ours = [cache for cache in caches if isinstance(cache, CompressedKVCache)]
    if ours:
        spec, visibility = ours[0].codec.spec, ours[0].visibility
        bits = f"{spec.key_bits}/{spec.value_bits}" if spec.key_codec != "exact" else "exact"
        reads = [visibility.exact_from(p) > visibility.sinks for p in range(len(kls))]
        coded = sum(reads) / len(reads)
    return Result(
        name=arm.name,
        bits=bits,
        summary=summary,
        verdict=verdict(summary, coded),
        coded_tokens=caches[0].offset if arm.mlx_lm_bits else coded_tokens(caches),
        tokens_per_second=_speed(runs),
        kl_by_position=[float(kls[i : i + BIN].mean()) for i in range(0, len(kls), BIN)],
        kl_by_window=[window.kl for window in windows],
        change_by_window=[w.perplexity / w.exact_perplexity - 1 for w in windows],
        **others,
    )

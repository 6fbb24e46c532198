"""A model read by every arm of a comparison: what is measured, and the report on it."""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache.parts import only_compressed
from ..reporting import status
from ..rules import SettingsError
from .arguments import read_windows
from .arms import BESIDE, EXACT, MLX_LM_GROUP, PRESET_ARMS, Arm, Run, configured
from .free_running import Generation, agreement, generate
from .memory import bf16_bytes, bytes_by_length, layer_shapes
from .output import interruption, lacking
from .progress import progress
from .report import Report, Result
from .runs import dtype_name, load_model, prompt_cache, quantized_tokens, table_bytes
from .statistics import Reading, summarize, verdict
from .task_results import Answers, answers, task_report
from .tasks import TASKS, Kind, Prompts
from .teacher_forcing import Divergence, lockstep
from .worst_tokens import worst_tokens

# Positions that one point of a curve by position stands for.
BIN = 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
# Of a task's prompt, for a model that doesn't say how many tokens it is made for.
LONGEST_PROMPT = 2**17
SIDES = "key", "value"


class Comparison:
    """Every arm that ``args`` asks for, and what the environment and the settings file ask for.

    Attributes:
        parts: the divergences of the arms in each window that all of them have read.
    """

    def __init__(self, args: argparse.Namespace):
        """Load the model and the text.

        Raises:
            SettingsError: something about the arguments, the files or the settings is wrong.
        """
        self.args = args
        loaded = load_model(args.model, needs_tokenizer=args.tokens is None or args.tasks > 0)
        self.model, self.tokenizer, self.context = loaded.model, loaded.tokenizer, loaded.context
        self._check_lengths()
        self.windows = read_windows(args, self.model, self.tokenizer)
        caches = prompt_cache(self.model)
        # Never evaluated: shapes and dtypes are known without.
        self.model(mx.zeros((1, 1), mx.int32), cache=caches)
        self.dtype, self.shapes = caches[0].keys.dtype, layer_shapes(caches)
        self.notes = loaded.beyond_context(args.length, "--length has")
        self.arms = self._chosen_arms()
        self.layer_arm = PRESET_ARMS["default" if "default" in args.presets else args.presets[0]]
        self.prompt = mx.array(self.windows[0][: self._prompt_length()])
        self.prompts = Prompts(self.tokenizer, args.tasks, args.task_lengths, args.depths)
        self._lengths = sorted({*LENGTHS, args.length})
        self._sizes = {
            arm.name: bytes_by_length(arm, self.model, self.shapes, self.dtype, self._lengths)
            for arm in self.arms
        }
        self._bf16 = [bf16_bytes(self.shapes, length) for length in self._lengths]
        self._sizes[EXACT.name] = [size * self.dtype.size // 2 for size in self._bf16]
        self.parts: list[list[Divergence]] = []
        self._runs: list[list[Run]] = []
        self._by_layer: list[float] = []
        self._generations: dict[str, Generation] = {}
        self._answers: list[tuple[Kind, Answers]] = []

    def _check_lengths(self) -> None:
        """Raise SettingsError for what is asked for beyond the model's context."""
        args, limit = self.args, self.context or LONGEST_PROMPT
        made_for = f"the model is made for {limit} tokens" if self.context else f"{limit} are most"
        for length in args.task_lengths if args.tasks else ():
            if length > limit:
                raise SettingsError(
                    f"--task-lengths has {length}, and {made_for}: choose shorter ones"
                )
        if self.context and args.generate >= self.context:
            raise SettingsError(
                f"--generate is {args.generate}, and {made_for}, with the prompt: choose fewer"
            )

    def _prompt_length(self) -> int:
        """Half a window, or what the model's context leaves beside what is generated."""
        half = -(-self.args.length // 2)
        return min(half, self.context - self.args.generate) if self.context else half

    def _chosen_arms(self) -> list[Arm]:
        """The arms in the order of the tables; what is to be said of them goes to the notes."""
        presets = [PRESET_ARMS[name] for name in self.args.presets]
        own = configured(self.model, presets)
        if own:
            presets.append(own[0])
            self.notes.append(f"{own[0].name}: {own[1]}")
        arms, left_out = applicable(
            [*presets, *(BESIDE[name] for name in self.args.beside)], self.shapes
        )
        self.notes += left_out
        return arms

    def measure(self) -> None:
        """Read the windows, generate, and answer the tasks: what is done is kept."""
        self.model.set_dtype(mx.float32)
        layers = range(len(self.shapes) if self.args.json or self.args.html else 0)
        with progress(self._total(len(layers)), "tokens") as bar:
            for window in self.windows:
                self._read(mx.array(window), [] if self.parts else layers, bar.update)
            for arm in (EXACT, *self.arms) if self.args.generate else ():
                self._generations[arm.name] = generate(
                    arm, self.model, self.prompt, self.args.generate, bar.update
                )
            for found in answers(self.prompts, self.arms, self.model, self.args.chunk, bar.update):
                self._answers.append(found)

    def _missing(self) -> Iterator[str]:
        """What was asked for and is not measured yet."""
        yield from lacking(len(self.parts), self.args.windows, "windows")
        names = [arm.name for arm in (EXACT, *self.arms) if arm.name not in self._generations]
        if names and self.args.generate:
            yield f"the generation of {', '.join(names)}"
        answered = Counter(kind.task for kind, _ in self._answers)
        each = len(self.prompts) // len(TASKS)
        for task in TASKS:
            yield from lacking(answered[task], each, f"prompts of the task {task}")

    def _total(self, layers: int) -> int:
        """All tokens that are read or generated, about."""
        each = self.args.windows * self.args.length + self.args.generate + self.prompts.tokens
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
        missing = list(self._missing())
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
            # One alone has nothing to be compared with.
            generated=args.generate if len(self._generations) > 1 else 0,
            prompt=self.prompt.size,
            quality_dtype="float32",
            kv_bytes_dtype=dtype_name(self.dtype),
            exact=exact,
            notes=[*interruption(missing), *self.notes],
            interrupted=bool(missing),
            missing=missing,
            results=results,
            bin=BIN,
            lengths=self._lengths,
            bf16_by_length=self._bf16,
            layer_arm=self.layer_arm.name,
            kl_by_layer=self._by_layer,
            tasks=task_report(self.arms, self._answers) if self._answers else None,
        )

    def _result(self, index: int, arm: Arm) -> Result:
        found = [parts[index] for parts in self.parts]
        spoken, said = (self._generations.get(name) for name in (EXACT.name, arm.name))
        runs = [runs[index] for runs in self._runs]
        tables = table_bytes(runs[-1].caches)
        at = self._lengths.index(self.args.length)
        size = [size + tables for size in self._sizes[arm.name]]
        coded = _coded_tokens(runs[-1])
        return _result(
            runs,
            found,
            bits=_bits(runs[-1], self.dtype),
            settings=arm.described,
            coded_tokens=coded,
            free=agreement(spoken.tokens, said.tokens) if spoken and said else None,
            decode_tokens_per_second=said and said.speed,
            kv_bytes_per_token=size[at] / self.args.length,
            kv_ratio=self._bf16[at] / size[at],
            bytes_by_length=size,
            worst=worst_tokens(self.tokenizer, self.windows, found) if arm.codes and coded else [],
            text=said and self.tokenizer.decode(said.tokens),
        )


def applicable(arms: Sequence[Arm], shapes: Sequence[Any]) -> tuple[list[Arm], list[str]]:
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


def _coded_tokens(run: Run) -> int:
    """How many tokens a run holds in fewer bits."""
    return run.caches[0].offset if run.arm.mlx_lm_bits else quantized_tokens(run.caches)


def _bits(run: Run, dtype: mx.Dtype) -> str:
    """Bits of keys and values in words: those of ``dtype`` where nothing is quantized."""
    specs = [cache.codec.spec for cache in only_compressed(run.caches) if cache.codec]
    if not specs:
        return str(run.arm.mlx_lm_bits or 8 * dtype.size)
    if specs[0].key_codec == "exact":
        return "exact"
    # Layers can differ.
    sides = (dict.fromkeys(getattr(spec, f"{side}_bits") for spec in specs) for side in SIDES)
    return "/".join(",".join(map(str, bits)) for bits in sides)


def _reading(run: Run, length: int) -> Reading:
    ours = [cache for cache in only_compressed(run.caches) if cache.codec and run.arm.codes]
    visibility = ours[0].visibility if ours else None
    return Reading.after(visibility.first_without(visibility.sinks) if visibility else 0, length)


def _result(runs: Sequence[Run], windows: Sequence[Divergence], **others: Any) -> Result:
    summary = summarize(windows)
    kls = np.mean([window.kls for window in windows], axis=0)
    return Result(
        name=runs[0].arm.name,
        summary=summary,
        verdict=verdict(summary, _reading(runs[-1], len(kls))),
        tokens_per_second=_speed(runs),
        kl_by_position=[float(kls[i : i + BIN].mean()) for i in range(0, len(kls), BIN)],
        kl_by_window=[window.kl for window in windows],
        change_by_window=[w.perplexity / w.exact_perplexity - 1 for w in windows],
        **others,
    )

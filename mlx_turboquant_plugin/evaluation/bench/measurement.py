"""What is measured, and taking turns."""

import statistics
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import mlx.core as mx


# The caches that are measured. The first of them that a group of measurements has is what
# its others are compared with.
KVCACHE = "KVCache"
BATCH_KVCACHE = "BatchKVCache"
QUANTIZED = "QuantizedKVCache"
COMPRESSED = "compressed"

# A compressed cache encodes once in so many steps of decoding: with whole rounds of them
# the mean has its full share of that work.
ROUND = 32

# An arm that is so many times slower than the fastest sits out turns.
SLOW = 4

# How much of the memory that MLX may use is filled.
ROOM = 0.9


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing that was done ``count`` times; ``low`` and ``high`` are quartiles."""

    median: float
    low: float
    high: float
    mean: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """The timing of one sample or more."""
        low, median, high = samples[0], samples[0], samples[0]
        if len(samples) > 1:
            low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, statistics.fmean(samples), len(samples))


@dataclass(frozen=True)
class Measurement:
    """One cache in one situation.

    Attributes:
        part: "call", "chain", "decode" or "prefill".
        tokens: in the cache before decoding, or of the prompt.
        batch: sequences.
        dtype: of the queries, keys and values.
        cache: its kind.
        seconds: of a step, or of a prompt.
        cache_bytes: of all layers that were measured, at the end.
        peak_bytes: the most memory in use at a time beyond the weights; None where
            that says nothing.
    """

    part: str
    tokens: int
    batch: int
    dtype: str
    cache: str
    seconds: Timing
    cache_bytes: int
    peak_bytes: Optional[int] = None


@dataclass(frozen=True)
class Skipped:
    """What was asked for and not measured, and why."""

    part: str
    tokens: int
    batch: int
    cache: str
    reason: str


@dataclass
class Results:
    """All that one run found."""

    measurements: List[Measurement]
    skipped: List[Skipped]

    def starts(
        self, part: str, tokens: int, batch: int, cache: str, run: Callable[[], object]
    ) -> bool:
        """Run for the first time; whether it can be measured, which is noted if not.

        MLX has no quantised products of some shapes on some devices.
        """
        try:
            run()
        except RuntimeError as error:
            if cache != QUANTIZED:
                raise
            self.skipped.append(Skipped(part, tokens, batch, cache, f"MLX can't: {error}"))
            return False
        return True


def take_turns(
    arms: Mapping[str, Callable[[], float]], rounds: int, tick: Callable[[], object]
) -> Dict[str, Timing]:
    """Let ``arms`` measure themselves in turns (A B A B ...).

    mlx-lm's quantised attention can be 50 times slower than all others on a CPU. It has
    no work that comes once in so many steps, so it can take fewer turns.

    Args:
        arms: each does its work once and returns the seconds that it took.
        tick: called after each round.
    """
    samples: Dict[str, List[float]] = {name: [arm()] for name, arm in arms.items()}
    tick()
    fastest = min(first for first, in samples.values())
    for turn in range(1, rounds):
        for name, arm in arms.items():
            every = int(samples[name][0] / (SLOW * fastest)) if name == QUANTIZED else 1
            if turn % max(1, every) == 0:
                samples[name].append(arm())
        tick()
    return {name: Timing.of(values) for name, values in samples.items()}


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype, such as "float16"."""
    return str(dtype).removeprefix("mlx.core.")


def too_large(needed: int) -> Optional[str]:
    """Why ``needed`` more bytes are too many for this machine, or None."""
    room = ROOM * mx.get_memory_limit() - mx.get_active_memory()
    if needed <= room:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, and {max(0, room) / 2**30:.1f} GiB are free"


def quantized_group(head_dim: int) -> Optional[int]:
    """The group size of mlx-lm's QuantizedKVCache for heads of this size, or None."""
    return next((group for group in (64, 32) if head_dim % group == 0), None)


def slow_when_quantized(dtype: mx.Dtype) -> bool:
    """Whether products with quantised matrices take MLX 15 to 100 times as long as in float32."""
    return mx.default_device().type == mx.cpu and dtype != mx.float32


def filled(cache: Any, keys: mx.array, values: mx.array) -> Any:
    """``cache`` with ``keys`` and ``values`` (B, H, T, D) appended."""
    cache.update_and_fetch(keys, values)
    mx.eval(cache.state)
    return cache

"""What is measured, and taking turns."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    Any,
    NamedTuple,
    TypeVar,
)

import mlx.core as mx

from ..runs import dtype_name

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

# How MLX says that a device lacks an operation.
UNSUPPORTED = re.compile(r"no (\w+ )?implementation|not (yet )?(implemented|supported)|NYI", re.I)

T = TypeVar("T")


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

    @property
    def spread(self) -> float:
        """Between the quartiles, as a part of the median."""
        return (self.high - self.low) / self.median


class Sample(NamedTuple):
    """One turn of one cache; the fields are those of :class:`Measurement`."""

    seconds: float
    cache_bytes: int
    peak_bytes: int | None = None


@dataclass
class Measurement:
    """One cache in one situation, as far as it has come.

    Attributes:
        part: "call", "chain", "decode" or "prefill".
        tokens: in the cache before decoding, or of the longest prompt.
        batch: sequences.
        dtype: of the queries, keys and values.
        cache: its kind.
        processed: tokens of all sequences that a step or a prompt brings.
        first: seconds of the first time in this process; None where that is not measured.
        samples: seconds of a step, or of a prompt, for each turn after that.
        cache_bytes: of all layers that were measured, at the end.
        peak_bytes: the most memory in use at a time beyond the weights; None where
            that says nothing.
    """

    part: str
    tokens: int
    batch: int
    dtype: str
    cache: str
    processed: int
    first: float | None = None
    samples: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int | None = None

    @property
    def seconds(self) -> Timing | None:
        """Of the samples; None as long as there are none."""
        return Timing.of(self.samples) if self.samples else None


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
    """All that one run has found so far.

    Attributes:
        done: the titles of the jobs that came to their end.
        kept: how many of ``measurements`` and of ``skipped`` are from these.
        asked: the titles of all jobs.
    """

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    kept: tuple[int, int] = (0, 0)
    asked: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """The titles of the jobs that did not come to their end."""
        return [title for title in self.asked if title not in self.done]

    def finish(self, title: str) -> None:
        """Note that a job has come to its end."""
        self.done.append(title)
        self.kept = len(self.measurements), len(self.skipped)


class NotMeasured(Exception):
    """Raised by an arm of mlx-lm's that is not worth going on with; the message says why."""


class Situation:
    """Caches that are measured side by side. Whatever one finds is in the results at once."""

    def __init__(
        self, results: Results, part: str, tokens: int, batch: int, dtype: mx.Dtype, processed: int
    ):
        self.results, self.part, self.tokens, self.batch = results, part, tokens, batch
        self.dtype, self.processed = dtype_name(dtype), processed
        self._measurements: dict[str, Measurement] = {}

    def skip(self, cache: str, reason: str) -> None:
        """Note that ``cache`` is not measured."""
        self.results.skipped.append(Skipped(self.part, self.tokens, self.batch, cache, reason))

    def attempt(self, cache: str, run: Callable[[], T]) -> T | None:
        """What ``run()`` returns, or None if a cache of mlx-lm's fails, which is noted.

        MLX has no quantized products of some shapes on some devices, and uncompressed
        caches need more memory than ours. What ours raises is passed on.
        """
        try:
            return run()
        except Exception as error:
            if cache == COMPRESSED:
                raise
            self.skip(cache, _reason(error))
            return None

    def attempt_all(self, runs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """What each of ``runs``, by cache, returns; those that fail are left out."""
        made = {cache: self.attempt(cache, run) for cache, run in runs.items()}
        return {cache: value for cache, value in made.items() if value is not None}

    def add_first(self, cache: str, sample: Sample) -> None:
        """Record the first time of all."""
        self._measurement(cache, sample).first = sample.seconds

    def take_turns(
        self, arms: Mapping[str, Callable[[], Sample]], rounds: int, tick: Callable[[], object]
    ) -> None:
        """Let ``arms`` measure themselves in turns (A B A B ...).

        mlx-lm's quantized attention can be 50 times slower than all others on a CPU. It has
        no work that comes once in so many steps, so it can take fewer turns.

        Args:
            arms: by cache; each does its work once.
            tick: called after each round.
        """
        arms = dict(arms)
        firsts: dict[str, float] = {}
        for turn in range(rounds):
            for cache, arm in list(arms.items()):
                every = 1
                if turn and cache == QUANTIZED:
                    every = max(1, int(firsts[cache] / (SLOW * min(firsts.values()))))
                if turn % every:
                    continue
                sample = self.attempt(cache, arm)
                if sample is None:
                    del arms[cache]
                    continue
                firsts.setdefault(cache, sample.seconds)
                self._measurement(cache, sample).samples.append(sample.seconds)
            tick()

    def _measurement(self, cache: str, sample: Sample) -> Measurement:
        """That of ``cache``, new if it has none, with the bytes of ``sample``."""
        if cache not in self._measurements:
            key = self.part, self.tokens, self.batch, self.dtype, cache
            self._measurements[cache] = Measurement(*key, self.processed)
            self.results.measurements.append(self._measurements[cache])
        found = self._measurements[cache]
        found.cache_bytes = sample.cache_bytes
        if sample.peak_bytes is not None:
            found.peak_bytes = max(sample.peak_bytes, found.peak_bytes or 0)
        return found


def _reason(error: Exception) -> str:
    """Why a cache of mlx-lm's was not measured."""
    if isinstance(error, NotMeasured):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if UNSUPPORTED.search(text):
        return f"MLX can't run it on {mx.default_device()}: {text}"
    return text


def too_large(needed: int) -> str | None:
    """Why ``needed`` more bytes are too many for this machine, or None."""
    # mx.get_memory_limit() is not in the first supported version.
    limit = mx.set_memory_limit(2**62)
    mx.set_memory_limit(limit)
    room = ROOM * limit - mx.get_active_memory()
    if needed <= room:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, and {max(0, room) / 2**30:.1f} GiB are free"


def quantized_group(head_dim: int) -> int | None:
    """The group size of mlx-lm's QuantizedKVCache for heads of this size, or None."""
    return next((group for group in (64, 32) if head_dim % group == 0), None)


def slow_when_quantized(dtype: mx.Dtype) -> bool:
    """Whether products with quantized matrices take MLX 15 to 100 times as long as in float32."""
    return mx.default_device().type == mx.cpu and dtype != mx.float32


def filled(cache: Any, keys: mx.array, values: mx.array) -> Any:
    """``cache`` with ``keys`` and ``values`` (B, H, T, D) appended."""
    cache.update_and_fetch(keys, values)
    mx.eval(cache.state)
    return cache

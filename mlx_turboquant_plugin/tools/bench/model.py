"""A whole model: decoding after a long context, and prompts."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...codecs.byte_matrix import constants
from ..runs import (
    compressed,
    compressed_prompt_cache,
    dtype_name,
    kv_bytes,
    prompt_cache,
    table_bytes,
)
from . import prompts
from .measurement import (
    BATCH_KVCACHE,
    COMPRESSED,
    KVCACHE,
    QUANTIZED,
    ROUND,
    NotMeasured,
    Results,
    Sample,
    Situation,
    filled,
    quantized_group,
    slow_when_quantized,
    too_large,
)

# A prompt with mlx-lm's quantized caches is left when it takes so many times as long as
# KVCache's first: without kernels for it, it could take many minutes.
PATIENCE = 3


class Heads(NamedTuple):
    """The keys and values of one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int


class ModelBench:
    """Measures one model.

    Args:
        model: with a KVCache in every layer.
        kv_bits: of mlx-lm's QuantizedKVCache.
        overrides: settings of the compressed cache, stronger than the environment.

    Raises:
        SettingsError: the model's caches can't be compressed.
    """

    def __init__(self, model: nn.Module, kv_bits: int, overrides: Mapping[str, Any]):
        self.model, self.kv_bits, self.overrides = model, kv_bits, overrides
        caches = prompt_cache(model)
        with self._patched(COMPRESSED):
            start = time.perf_counter()
            # Tables are made with what is measured of the model: part of its first prompt.
            table_bytes(compressed_prompt_cache(model))
            self._preparation = {COMPRESSED: time.perf_counter() - start}
        # Never evaluated: shapes and dtypes are known without.
        logits = model(mx.zeros((1, 1), mx.int32), cache=caches)
        self.vocabulary = logits.shape[-1]
        self.dtype = caches[0].keys.dtype
        self.layers = [
            Heads(cache.keys.shape[1], cache.keys.shape[-1], cache.values.shape[-1])
            for cache in caches
        ]

    def decode(
        self, results: Results, tokens: int, batch: int, rounds: int, tick: Callable
    ) -> None:
        """Decode ``rounds`` times 32 tokens after ``tokens`` random keys and values.

        Single sequences use what mlx-lm uses for them, several what its batches use; all
        rows of a batch are alike.
        """
        situation = Situation(results, "decode", tokens, batch, self.dtype, batch)
        arms = situation.attempt_all(
            {
                kind: partial(self._decoding, kind, tokens, batch)
                for kind in self._possible(situation, 1.6 * batch * tokens)
            }
        )
        situation.take_turns(arms, rounds, tick)

    def prefill(
        self, results: Results, tokens: int, batch: int, chunk: int, rounds: int, tick: Callable
    ) -> None:
        """Process random prompts, the longest of ``tokens``, in steps of ``chunk``.

        Timed from making the caches to the first tokens that follow. The first time of
        each cache is recorded by itself, KVCache's before the others'; then they take
        turns. ``tick`` is called ``rounds`` + 1 times.
        """
        lengths = prompts.lengths(tokens, batch)
        situation = Situation(results, "prefill", tokens, batch, self.dtype, sum(lengths))
        rows = [mx.random.randint(0, self.vocabulary, (length,)) for length in lengths]
        mx.eval(rows)
        arms: dict[str, Callable[[], Sample]] = {}
        limit = math.inf
        for kind in self._possible(situation, 1.1 * sum(lengths)):
            arm = partial(self._prefill, kind, rows, chunk, limit)
            sample = situation.attempt(kind, arm)
            if sample is None:
                continue
            arms[kind] = arm
            seconds = sample.seconds + self._preparation.pop(kind, 0.0)
            situation.add_first(kind, sample._replace(seconds=seconds))
            if kind == KVCACHE:
                limit = PATIENCE * seconds
        tick()
        situation.take_turns(arms, rounds, tick)

    def _prefill(self, kind: str, rows: list[mx.array], chunk: int, limit: float) -> Sample:
        """Process prompts once; a quantized cache has ``limit`` seconds for it."""
        before = _fresh_peak()

        def progress(done: int, total: int) -> None:
            if kind == QUANTIZED and time.perf_counter() - start > limit:
                raise NotMeasured(
                    f"takes more than {PATIENCE} times as long as the first with {KVCACHE}"
                )

        with self._patched(kind):
            start = time.perf_counter()
            empty = [self._caches(kind) for _ in rows]
            if len(rows) == 1:
                caches = prompts.process_one(self.model, rows[0], empty[0], chunk, progress)
            else:
                caches = prompts.process_batch(self.model, rows, empty, chunk)
            seconds = time.perf_counter() - start
        size = kv_bytes(caches) + table_bytes(caches)
        return Sample(seconds, size, mx.get_peak_memory() - before)

    def _possible(self, situation: Situation, tokens: float) -> list[str]:
        """The kinds that fit, with ``tokens`` in all, and that don't take hours.

        mlx-lm has no batches of quantized caches.
        """
        numbers = sum(heads.kv_heads * (heads.key_dim + heads.value_dim) for heads in self.layers)
        reason = too_large(int(tokens * numbers * self.dtype.size))
        if reason:
            situation.skip("all", reason)
            return []
        if situation.batch > 1:
            return [BATCH_KVCACHE, COMPRESSED]
        if self._group() is None:
            reason = "mlx-lm can't quantize heads of this size"
        elif slow_when_quantized(self.dtype):
            reason = (
                f"many times slower in {dtype_name(self.dtype)} on a CPU: try --model-dtype float32"
            )
        else:
            return [KVCACHE, QUANTIZED, COMPRESSED]
        situation.skip(QUANTIZED, reason)
        return [KVCACHE, COMPRESSED]

    def _group(self) -> int | None:
        groups = {quantized_group(dim) for heads in self.layers for dim in heads[1:]}
        known = {group for group in groups if group}
        return min(known) if known == groups else None

    def _caches(self, kind: str) -> list[Any]:
        if kind == COMPRESSED:
            return compressed_prompt_cache(self.model)
        caches = prompt_cache(self.model)
        if kind == QUANTIZED:
            return [c.to_quantized(group_size=self._group(), bits=self.kv_bits) for c in caches]
        return caches

    def _filled(self, kind: str, tokens: int, batch: int) -> tuple[list[Any], int]:
        """Full caches, and the bytes of their tables."""
        with self._patched(kind):
            caches = self._caches(kind)
            for index, heads in enumerate(self.layers):
                keys, values = (
                    mx.random.normal((1, heads.kv_heads, tokens, dim)).astype(self.dtype)
                    for dim in (heads.key_dim, heads.value_dim)
                )
                filled(caches[index], keys, values)
            tables = table_bytes(caches)
            if batch > 1:
                caches = [type(cache).merge([cache] * batch) for cache in caches]
            return caches, tables

    def _decoding(self, kind: str, tokens: int, batch: int) -> Callable[[], Sample]:
        """What decodes once each time it is called, warmed up."""
        before = _fresh_peak()
        caches, tables = self._filled(kind, tokens, batch)
        mx.clear_cache()
        mx.reset_peak_memory()
        self._decode(kind, caches, batch)
        peak = mx.get_peak_memory() - before

        def turn() -> Sample:
            seconds = self._decode(kind, caches, batch)
            return Sample(seconds, kv_bytes(caches) + tables, peak)

        return turn

    def _decode(self, kind: str, caches: list[Any], batch: int) -> float:
        """Seconds of a step. As mlx-lm does it: while one is computed the next is prepared."""
        with self._patched(kind):

            def step(token: mx.array) -> mx.array:
                logits = self.model(token[:, None], cache=caches)[:, -1]
                return mx.argmax(logits, axis=-1)

            # As mlx-lm does it every 256 tokens; and MLX would keep buffers of the cache before,
            # which have other sizes, instead of this one's.
            mx.clear_cache()
            token = step(mx.zeros((batch,), mx.int32))
            mx.eval(token)
            start = time.perf_counter()
            for _ in range(ROUND):
                following = step(token)
                mx.async_eval(following)
                mx.eval(token)
                token = following
            mx.eval(token)
            return (time.perf_counter() - start) / ROUND

    def _patched(self, kind: str) -> AbstractContextManager:
        return compressed(**self.overrides) if kind == COMPRESSED else nullcontext()


def _fresh_peak() -> int:
    """Start to look for the peak of memory; returns what is in use now."""
    # Left over from an earlier measurement they would be missing in this one.
    constants.cache_clear()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()

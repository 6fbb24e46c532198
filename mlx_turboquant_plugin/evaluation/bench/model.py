"""A whole model: decoding after a long context, and prompts in chunks."""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from ...codecs.byte_matrix import constants
from ..runs import compressed, compressed_prompt_cache, kv_bytes, prompt_cache, table_bytes
from .measurement import BATCH_KVCACHE, COMPRESSED, KVCACHE, QUANTIZED, ROUND
from .measurement import Measurement, Results, Skipped, dtype_name, filled, quantized_group
from .measurement import slow_when_quantized, take_turns, too_large

# Models that can be measured without their weights.
SHAPES: Dict[str, Callable[[], nn.Module]] = {
    "qwen3-8b": lambda: qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=4096,
            num_hidden_layers=36,
            intermediate_size=12288,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            vocab_size=151936,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            rope_theta=1e6,
        )
    )
}


def random_model(shape: str) -> nn.Module:
    """A model of one of the ``SHAPES`` with random weights in bfloat16."""
    model = SHAPES[shape]()
    model.set_dtype(mx.bfloat16)
    # One by one, or all of them would be there in float32 for a while.
    for _, weights in tree_flatten(model.parameters()):
        mx.eval(weights)
    return model


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
            compressed_prompt_cache(model)
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
        rows of a batch are alike. mlx-lm has no batches of quantised caches.
        """
        numbers = sum(heads.kv_heads * (heads.key_dim + heads.value_dim) for heads in self.layers)
        reason = too_large(int(1.6 * batch * tokens * numbers * self.dtype.size))
        if reason:
            results.skipped.append(Skipped("decode", tokens, batch, "all", reason))
            return
        kinds = [KVCACHE, QUANTIZED, COMPRESSED] if batch == 1 else [BATCH_KVCACHE, COMPRESSED]
        arms: Dict[str, List[Any]] = {}
        peaks: Dict[str, int] = {}
        tables: Dict[str, int] = {}
        for kind in self._possible(kinds, "decode", tokens, batch, results):
            before = _fresh_peak()
            arms[kind], tables[kind] = self._filled(kind, tokens, batch)
            mx.clear_cache()
            mx.reset_peak_memory()
            # Warms up, too.
            run = partial(self._decode, kind, arms[kind], batch)
            if results.starts("decode", tokens, batch, kind, run):
                peaks[kind] = mx.get_peak_memory() - before
            else:
                del arms[kind]
            # Or it would hold the caches of one that is left out.
            del run
        timers = {kind: partial(self._decode, kind, arms[kind], batch) for kind in arms}
        for kind, seconds in take_turns(timers, rounds, tick).items():
            results.measurements.append(
                Measurement(
                    "decode",
                    tokens,
                    batch,
                    dtype_name(self.dtype),
                    kind,
                    seconds,
                    kv_bytes(arms[kind]) + tables[kind],
                    peaks[kind],
                )
            )

    def prefill(
        self, results: Results, tokens: int, chunk: int, rounds: int, tick: Callable
    ) -> None:
        """Process a prompt of ``tokens`` random tokens, ``chunk`` at a time."""
        prompt = mx.random.randint(0, self.vocabulary, (1, tokens))
        kinds = self._possible([KVCACHE, QUANTIZED, COMPRESSED], "prefill", tokens, 1, results)
        sizes: Dict[str, int] = {}
        peaks: Dict[str, int] = {}

        def timer(kind: str, tokens: mx.array) -> Callable[[], float]:
            def run() -> float:
                before = _fresh_peak()
                with self._patched(kind):
                    caches = self._caches(kind)
                    start = time.perf_counter()
                    # As mlx-lm does it: the logits of a prompt are never evaluated.
                    for first in range(0, tokens.shape[1], chunk):
                        self.model(tokens[:, first : first + chunk], cache=caches)
                        mx.eval([cache.state for cache in caches])
                        mx.clear_cache()
                    seconds = time.perf_counter() - start
                peaks[kind] = mx.get_peak_memory() - before
                sizes[kind] = kv_bytes(caches) + table_bytes(caches)
                return seconds

            return run

        kinds = [
            kind
            for kind in kinds
            if results.starts("prefill", tokens, 1, kind, timer(kind, prompt[:, : 2 * chunk]))
        ]
        timings = take_turns({kind: timer(kind, prompt) for kind in kinds}, rounds, tick)
        for kind, seconds in timings.items():
            results.measurements.append(
                Measurement(
                    "prefill",
                    tokens,
                    1,
                    dtype_name(self.dtype),
                    kind,
                    seconds,
                    sizes[kind],
                    peaks[kind],
                )
            )

    def _possible(self, kinds, part: str, tokens: int, batch: int, results: Results) -> List[str]:
        """``kinds`` without the quantised cache if it can't be had or takes hours."""
        if QUANTIZED not in kinds:
            return kinds
        if self._group() is None:
            reason = "mlx-lm can't quantise heads of this size"
        elif slow_when_quantized(self.dtype):
            reason = (
                f"many times slower in {dtype_name(self.dtype)} on a CPU: try "
                "--model-dtype float32"
            )
        else:
            return kinds
        results.skipped.append(Skipped(part, tokens, batch, QUANTIZED, reason))
        return [kind for kind in kinds if kind != QUANTIZED]

    def _group(self) -> Optional[int]:
        groups = {quantized_group(dim) for heads in self.layers for dim in heads[1:]}
        return None if None in groups else min(groups)

    def _caches(self, kind: str) -> List[Any]:
        if kind == COMPRESSED:
            return compressed_prompt_cache(self.model)
        caches = prompt_cache(self.model)
        if kind == QUANTIZED:
            return [c.to_quantized(group_size=self._group(), bits=self.kv_bits) for c in caches]
        return caches

    def _filled(self, kind: str, tokens: int, batch: int) -> Tuple[List[Any], int]:
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

    def _decode(self, kind: str, caches: List[Any], batch: int) -> float:
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

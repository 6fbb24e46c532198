"""Decoding with one attention layer: nothing but the cache and the attention over it."""

import itertools
import time
from typing import Any, Callable, Dict, List, NamedTuple

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ... import settings
from ...attention.dispatch import attend
from ...attention.kernels import resolve_kernel
from ...cache import BatchCompressedKVCache, CompressedKVCache, Visibility
from ...codecs.kv_codec import CodecSpec, KVCodec
from ..runs import kv_bytes, table_bytes
from .measurement import BATCH_KVCACHE, COMPRESSED, KVCACHE, QUANTIZED, ROUND
from .measurement import Measurement, Results, Skipped, dtype_name, filled, quantized_group
from .measurement import take_turns, too_large

WARM_UP = 3


class Layer(NamedTuple):
    """The shape of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


class LayerBench:
    """Several layers of one shape, so that no cache of theirs stays in the processor's own.

    Args:
        chosen: the codec and the kernel of the compressed arm.
        layers: how many.
        kv_bits: of mlx-lm's QuantizedKVCache.
        chain: whether to time a chain of all layers too.
    """

    def __init__(
        self, layer: Layer, chosen: settings.Settings, layers: int, kv_bits: int, chain: bool
    ):
        self.layer, self.layers, self.kv_bits, self.chain = layer, layers, kv_bits, chain
        dim, [chosen] = layer.head_dim, chosen.for_layers(1)
        spec = CodecSpec(
            dim, dim, chosen.key_codec, chosen.key_bits, chosen.value_codec, chosen.value_bits
        )
        self._codec = KVCodec(spec)
        self._visibility = Visibility(chosen.window, chosen.sinks, chosen.invariant)
        self._kernel = resolve_kernel(chosen.kernel)

    def measure(
        self, results: Results, tokens: int, batch: int, dtype: mx.Dtype, rounds: int, tick: Callable
    ) -> None:
        """Measure one length and batch size: ``rounds`` times 32 steps of every cache."""
        layer = self.layer
        exact = 2 * batch * layer.kv_heads * tokens * layer.head_dim * dtype.size * self.layers
        # BatchKVCache is a second one of that size, and the two small ones are less than a third.
        reason = too_large(int(exact * (1.6 if batch == 1 else 2.6)))
        if reason:
            results.skipped.append(Skipped("call", tokens, batch, "all", reason))
            return
        if quantized_group(layer.head_dim) is None:
            reason = f"mlx-lm can't quantise heads of {layer.head_dim}"
            results.skipped.append(Skipped("call", tokens, batch, QUANTIZED, reason))
        arms = self._arms(tokens, batch, dtype)
        query, token = (
            mx.random.normal((batch, heads, 1, layer.head_dim)).astype(dtype)
            for heads in (layer.heads, layer.kv_heads)
        )
        mx.eval(query, token)
        # As mlx-lm does it after a prompt: MLX would keep buffers of other sizes instead.
        mx.clear_cache()
        parts = {"call": _one_call}
        if self.chain:
            parts["chain"] = _one_chain
        for part, timer in parts.items():
            timers = {name: timer(caches, query, token) for name, caches in arms.items()}
            timers = {
                name: run
                for name, run in timers.items()
                if results.starts(part, tokens, batch, name, run)
            }
            for name, run in timers.items():
                # A round has every kind of step, and each has kernels that are compiled once.
                for _ in range(ROUND if name == COMPRESSED else WARM_UP):
                    run()
            for name, seconds in take_turns(timers, rounds * ROUND, tick).items():
                size = kv_bytes(arms[name])
                if name == COMPRESSED:
                    size += table_bytes([CompressedKVCache(self._codec)])
                results.measurements.append(
                    Measurement(part, tokens, batch, dtype_name(dtype), name, seconds, size)
                )

    def _arms(self, tokens: int, batch: int, dtype: mx.Dtype) -> Dict[str, List[Any]]:
        """A filled cache of every kind for every layer. All rows of a batch are alike."""
        arms: Dict[str, List[Any]] = {}
        layer, group = self.layer, quantized_group(self.layer.head_dim)
        for _ in range(self.layers):
            shape = 2, 1, layer.kv_heads, tokens, layer.head_dim
            keys, values = mx.random.normal(shape).astype(dtype)
            single = filled(KVCache(), keys, values)
            ours = filled(
                CompressedKVCache(self._codec, self._visibility, self._kernel), keys, values
            )
            if batch == 1:
                of_layer = {KVCACHE: single, COMPRESSED: ours}
            else:
                keys, values = (mx.repeat(x, batch, axis=0) for x in (keys, values))
                of_layer = {
                    KVCACHE: filled(KVCache(), keys, values),
                    BATCH_KVCACHE: KVCache.merge([single] * batch),
                    COMPRESSED: CompressedKVCache.merge([ours] * batch),
                }
            if group:
                quantized = QuantizedKVCache(group_size=group, bits=self.kv_bits)
                of_layer[QUANTIZED] = filled(quantized, keys, values)
            for name, cache in of_layer.items():
                arms.setdefault(name, []).append(cache)
        return {
            name: arms[name]
            for name in (KVCACHE, BATCH_KVCACHE, QUANTIZED, COMPRESSED)
            if name in arms
        }


def _one_call(caches: List[Any], query: mx.array, token: mx.array) -> Callable[[], float]:
    """Times a step of one layer, from the call in Python to the result; another layer each time."""
    turn = itertools.cycle(caches)

    def run() -> float:
        cache = next(turn)
        start = time.perf_counter()
        mx.eval(_step(cache, query, token, create_attention_mask(token[:, 0], cache)))
        return time.perf_counter() - start

    return run


def _one_chain(caches: List[Any], query: mx.array, token: mx.array) -> Callable[[], float]:
    """Times a layer in a chain of all: each one's output is the query of the next.

    Only the evaluation is timed: while a model generates, Python prepares a step during
    the one before.
    """

    def run() -> float:
        out = query
        # One each, since not all need be of the same length.
        masks = [create_attention_mask(token[:, 0], cache) for cache in caches]
        mx.eval([mask for mask in masks if isinstance(mask, mx.array)])
        for cache, mask in zip(caches, masks):
            out = _step(cache, out, token, mask)
        start = time.perf_counter()
        mx.eval(out)
        return (time.perf_counter() - start) / len(caches)

    return run


def _step(cache: Any, query: mx.array, token: mx.array, mask: Any) -> mx.array:
    """Append ``token`` (B, H_kv, 1, D) and attend with ``query`` (B, H_q, 1, D)."""
    # mlx-lm's quantised attention multiplies its queries in place.
    query, scale = mx.array(query), query.shape[-1] ** -0.5
    if isinstance(cache, (CompressedKVCache, BatchCompressedKVCache)):
        cache.attending = True
        keys, values = cache.update_and_fetch(token, token)
        out = attend(
            scaled_dot_product_attention, query, keys, values, cache, scale=scale, mask=mask
        )
        cache.attending, cache.view = False, None
        return out
    keys, values = cache.update_and_fetch(token, token)
    return scaled_dot_product_attention(query, keys, values, cache, scale=scale, mask=mask)

"""Decoding with one attention layer: nothing but the cache and the attention over it."""

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ... import settings
from ...attention.dispatch import attend
from ...backends.choice import kernel_of
from ...cache import BatchCompressedKVCache, CompressedKVCache, Visibility
from ...codecs.key_bias import KeyBias
from ...codecs.kv_codec import CodecSpec, KVCodec
from ...integration.balance import layout, query_squares
from ...integration.layer import key_codec
from ..runs import kv_bytes, table_bytes
from .measurement import (
    BATCH_KVCACHE,
    COMPRESSED,
    KVCACHE,
    QUANTIZED,
    ROUND,
    Results,
    Sample,
    Situation,
    filled,
    quantized_group,
    too_large,
)

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
            dim,
            dim,
            key_codec(chosen, dim),
            chosen.key_bits,  # type: ignore[arg-type]
            chosen.value_codec,
            chosen.value_bits,  # type: ignore[arg-type]
        )
        self._codec = _like_a_models(spec, layer.kv_heads)
        self._visibility = Visibility(chosen.window, chosen.sinks, chosen.invariant)
        self._kernel = kernel_of(chosen)

    def measure(
        self,
        results: Results,
        tokens: int,
        batch: int,
        dtype: mx.Dtype,
        rounds: int,
        tick: Callable,
    ) -> None:
        """Measure one length and batch size: ``rounds`` times 32 steps of every cache."""
        layer = self.layer
        situation = Situation(results, "call", tokens, batch, dtype, batch)
        exact = 2 * batch * layer.kv_heads * tokens * layer.head_dim * dtype.size * self.layers
        # BatchKVCache is a second one of that size, and the two small ones are less than a third.
        reason = too_large(int(exact * (1.6 if batch == 1 else 2.6)))
        if reason:
            situation.skip("all", reason)
            return
        kinds = [KVCACHE, QUANTIZED, COMPRESSED]
        if batch > 1:
            kinds.insert(1, BATCH_KVCACHE)
        if quantized_group(layer.head_dim) is None:
            situation.skip(QUANTIZED, f"mlx-lm can't quantize heads of {layer.head_dim}")
            kinds.remove(QUANTIZED)
        arms = situation.attempt_all(
            {kind: partial(self._filled, kind, tokens, batch, dtype) for kind in kinds}
        )
        query, token = (
            mx.random.normal((batch, heads, 1, layer.head_dim)).astype(dtype)
            for heads in (layer.heads, layer.kv_heads)
        )
        mx.eval(query, token)
        # As mlx-lm does it after a prompt: MLX would keep buffers of other sizes instead.
        mx.clear_cache()
        self._measure(situation, _one_call, arms, query, token, rounds, tick)
        if self.chain:
            situation = Situation(results, "chain", tokens, batch, dtype, batch)
            self._measure(situation, _one_chain, arms, query, token, rounds, tick)

    def _measure(
        self,
        situation: Situation,
        timer: Callable,
        arms: Mapping[str, list[Any]],
        query: mx.array,
        token: mx.array,
        rounds: int,
        tick: Callable,
    ) -> None:
        tables = dict.fromkeys(arms, 0)
        if COMPRESSED in arms:
            tables[COMPRESSED] = table_bytes([CompressedKVCache(self._codec)])

        def warmed_up(kind: str) -> Callable[[], Sample]:
            step = timer(arms[kind], query, token)

            def turn() -> Sample:
                return Sample(step(), kv_bytes(arms[kind]) + tables[kind])

            # A round has every kind of step, and each has kernels that are compiled once.
            for _ in range(ROUND if kind == COMPRESSED else WARM_UP):
                step()
            return turn

        turns = situation.attempt_all({kind: partial(warmed_up, kind) for kind in arms})
        situation.take_turns(turns, rounds * ROUND, tick)

    def _filled(self, kind: str, tokens: int, batch: int, dtype: mx.Dtype) -> list[Any]:
        """A filled cache for every layer. All rows of a batch are alike."""
        layer, caches = self.layer, []
        for _ in range(self.layers):
            shape = 2, 1, layer.kv_heads, tokens, layer.head_dim
            keys, values = mx.random.normal(shape).astype(dtype)
            if kind in (KVCACHE, QUANTIZED):
                keys, values = (mx.repeat(x, batch, axis=0) for x in (keys, values))
            cache = filled(self._empty(kind), keys, values)
            merged = batch > 1 and kind in (BATCH_KVCACHE, COMPRESSED)
            caches.append(type(cache).merge([cache] * batch) if merged else cache)
        return caches

    def _empty(self, kind: str) -> Any:
        if kind == COMPRESSED:
            return CompressedKVCache(self._codec, self._visibility, self._kernel)
        if kind == QUANTIZED:
            group = quantized_group(self.layer.head_dim)
            assert group  # Where there is none it is not measured.
            return QuantizedKVCache(group_size=group, bits=self.kv_bits)
        return KVCache()


def _like_a_models(spec: CodecSpec, kv_heads: int) -> KVCodec:
    """A codec with all that a model's keys come with; what the numbers are takes no time."""
    shape = kv_heads, spec.head_dim
    balance = mx.exp(0.3 * mx.random.normal((kv_heads, 1, spec.head_dim)))
    mx.eval(balance)
    bias = KeyBias(mx.random.normal(shape), nn.RoPE(spec.head_dim))
    if spec.segments == 1:
        return KVCodec(spec, balance, bias)
    keys, queries = (mx.exp(mx.random.normal(shape)) for _ in range(2))
    cut, squares = layout(keys, queries, None), query_squares(keys, queries, None)
    return KVCodec(spec, balance, bias, cut, squares)


def _one_call(caches: list[Any], query: mx.array, token: mx.array) -> Callable[[], float]:
    """Times a step of one layer, from the call in Python to the result; another layer each time."""
    turn = itertools.cycle(caches)

    def run() -> float:
        cache = next(turn)
        start = time.perf_counter()
        mx.eval(_step(cache, query, token, create_attention_mask(token[:, 0], cache)))
        return time.perf_counter() - start

    return run


def _one_chain(caches: list[Any], query: mx.array, token: mx.array) -> Callable[[], float]:
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
    # mlx-lm's quantized attention multiplies its queries in place.
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

"""What a layer's attention hands to MLX on NVIDIA GPUs, and how often; nothing is launched."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from layouts import layout

from mlx_turboquant_plugin.attention import dispatch
from mlx_turboquant_plugin.backends.cuda import attend as cuda
from mlx_turboquant_plugin.backends.cuda import encode as cuda_encode
from mlx_turboquant_plugin.backends.cuda import portable as cuda_portable
from mlx_turboquant_plugin.backends.cuda import source as cuda_source
from mlx_turboquant_plugin.backends.cuda.layer import layer_of
from mlx_turboquant_plugin.cache import (
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
from mlx_turboquant_plugin.cache.passes import plan_step, plan_view
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec

HEADS, DIM = 2, 64


def codec(balanced=True, biased=True, seed=0):
    mx.random.seed(seed)
    return KVCodec(
        CodecSpec(DIM, DIM, SEGMENTED, 4, "lloyd-max", 4),
        mx.random.uniform(1, 2, (HEADS, 1, DIM)) if balanced else None,
        KeyBias(mx.random.normal((HEADS, DIM)), nn.RoPE(DIM, base=700)) if biased else None,
        layout(HEADS, DIM),
    )


def test_words_are_those_of_the_arrays():
    one = codec()
    layer = layer_of(one)
    words = np.array(layer.known[0]).view(np.uint32)
    arrays = (one.balance, one.bias.bias, one.layout)
    np.testing.assert_array_equal(
        words, np.concatenate([np.array(x).view(np.uint32).ravel() for x in arrays])
    )
    rotations = (one.value_rotation.array, one.key_rotation.array)
    np.testing.assert_array_equal(layer.kind.rotations, mx.concatenate(rotations))


def test_what_layers_share_and_what_is_counted():
    one, other = codec(), codec(seed=1)
    layer = layer_of(one)
    assert layer_of(one) is layer and layer_of(other).kind is layer.kind
    assert layer_of(other).kind.rotations is layer.kind.rotations
    assert layer_of(codec(biased=False)).kind is not layer.kind
    counted = {id(x) for x in one.tables}
    assert {id(layer.kind.rotations), id(layer.known[0])} <= counted
    assert layer_of(KVCodec(one.spec)).known == ()


@pytest.fixture
def described(monkeypatch):
    """The names of the kernels whose launches are described."""
    names = []

    class Kernel:
        def __init__(self, name, inputs, outputs, body):
            self.name, self.inputs = name, inputs

        def __call__(self, *, inputs, output_shapes, output_dtypes, **launch):
            assert len(inputs) == len(self.inputs)
            names.append(self.name)
            return list(map(mx.zeros, output_shapes, output_dtypes))

    made = (
        # Plans keep launches.
        plan_step,
        plan_view,
        cuda._attention,
        cuda._split_kernel,
        cuda._merge_kernel,
        cuda_encode._encode_kernel,
        cuda_portable.kernel,
    )
    for kernels in made:
        kernels.cache_clear()
    monkeypatch.setattr(cuda_source, "kernel", Kernel)
    yield names
    for kernels in made:
        kernels.cache_clear()


def test_all_layers_and_steps_share_a_description(described):
    caches = [CompressedKVCache(codec(seed=seed), Visibility(), "cuda") for seed in range(3)]

    def step(caches, batch=1):
        keys, queries = mx.ones((batch, HEADS, 1, DIM)), mx.ones((batch, 4 * HEADS, 1, DIM))
        for cache in caches:
            cache.attending = True
            cache.update_and_fetch(keys, keys)
            dispatch.attend(None, queries, keys, keys, cache, 0.1, None)

    def fill(cache, batch):
        cache.append(*mx.zeros((2, batch, HEADS, 321, DIM)))

    for cache in caches:
        fill(cache, 1)
    described.clear()
    for _ in range(4):
        step(caches)
    assert described == ["split", "merge"]
    # The same function, traced for other shapes.
    wider = CompressedKVCache(codec(), Visibility(), "cuda")
    fill(wider, 2)
    described.clear()
    step([wider], 2)
    step(caches)
    assert described == ["split", "merge"]


def test_a_ring_that_is_full_shares_them_for_good(described):
    cache = RotatingCompressedKVCache(512, 4, codec(), Visibility(), "cuda")
    cache.append(*mx.zeros((2, 1, HEADS, 1500, DIM)))
    keys, queries = mx.ones((1, HEADS, 1, DIM)), mx.ones((1, 4 * HEADS, 1, DIM))
    for step in range(160):
        if step == 64:
            described.clear()
        cache.attending = True
        cache.update_and_fetch(keys, keys)
        dispatch.attend(None, queries, keys, keys, cache, 0.1, None)
    assert set(described) == {"encode"}


def test_batches_at_the_same_positions_have_bounds_of_their_own(described, monkeypatch):
    bounds, attention = [], cuda._attention

    def noted(*kind):
        def attend(queries, *others):
            bounds.append(next(x.shape for x in others if x.dtype == mx.int32 and x.ndim == 3))
            return attention(*kind)(queries, *others)

        return attend

    monkeypatch.setattr(cuda, "_attention", noted)
    one = codec()
    for batch in (1, 2, 3, 1):
        cache = CompressedKVCache(one, Visibility(), "cuda")
        cache.append(*mx.zeros((2, batch, HEADS, 321, DIM)))
        keys, queries = mx.ones((batch, HEADS, 1, DIM)), mx.ones((batch, 4 * HEADS, 1, DIM))
        cache.attending = True
        cache.update_and_fetch(keys, keys)
        dispatch.attend(None, queries, keys, keys, cache, 0.1, None)
    assert bounds == [(1, 1, 4), (2, 1, 4), (3, 1, 4), (1, 1, 4)]

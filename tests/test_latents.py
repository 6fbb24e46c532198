"""Models that cache latents, and others whose attention computes with keys as arrays."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models
from mlx_lm.generate import _merge_caches
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache
from test_models import CHUNKS, TOKENS, compressed_parts, error, run

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.integration.calibration import _summary
from mlx_turboquant_plugin.integration.layer import ROTARY_PART

# The settings that split these tokens into full-precision and quantized ones.
SETTINGS = dict(window=32, sinks=2)


def model_of(name, **settings):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.enable(**SETTINGS, **settings)
    return model


@pytest.mark.parametrize("name", ["deepseek_v3", "mistral4", "deepseek_v32"])
def test_invariant_is_whole_as_in_chunks(name):
    model = model_of(name, invariant=True)
    tokens = TOKENS[:, :140]
    whole, _ = run(model, tokens, (140,))
    for chunks in [(50, 70, 20), (93, *(1,) * 3, 10, 34)]:
        assert error(run(model, tokens, chunks)[0], whole) < 1e-4


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_invariant_is_a_batch_as_each_alone(name):
    model = model_of(name, invariant=True)
    prompts = TOKENS[:, :100], TOKENS[:, 20:85]
    alone = [run(model, prompt, (prompt.shape[1],)) for prompt in prompts]
    caches = _merge_caches([mlx_lm_cache.make_prompt_cache(model) for _ in prompts])
    padded = mx.concatenate([prompts[0], mx.pad(prompts[1], [(0, 0), (0, 35)])])
    lengths = [prompt.shape[1] for prompt in prompts]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[0, 35])
    together, caches = run(model, padded, (40, 60), caches)
    for cache in caches:
        cache.finalize()
    for row, (expected, _) in enumerate(alone):
        assert error(together[row : row + 1, : lengths[row]], expected) < 1e-4
    step, _ = run(model, mx.concatenate([TOKENS[:, 100:103]] * 2), (1, 1, 1), caches)
    for row, (_, cache) in enumerate(alone):
        expected, _ = run(model, TOKENS[:, 100:103], (1, 1, 1), cache)
        assert error(step[row : row + 1], expected) < 1e-4


@pytest.mark.parametrize("shape", [None, (1, 1, 8, 100), (1, 100)])
def test_masks_that_are_not_causal_are_honoured(shape):
    """A step that crosses a block, whose queries see each other."""
    model = model_of("gemma2", bypass="identity")
    attention, x = model.layers[0].self_attn, mx.random.normal((1, 100, model.args.hidden_size))
    outs = []
    for cache in mlx_lm_cache.make_prompt_cache(model)[0], KVCache():
        attention(x[:, :92], cache.make_mask(92, return_array=True, window_size=None), cache)
        outs.append(attention(x[:, 92:], shape and mx.ones(shape, mx.bool_), cache))
    assert error(*outs) < 1e-4


@pytest.mark.parametrize("name", ["mistral4", "longcat_flash"])
def test_quantized_weights_tell_what_latents_are_like(name):
    exact, quantized = (tiny_models.build(name, qk_nope_head_dim=32) for _ in range(2))
    nn.quantize(quantized, group_size=32, bits=8)
    mlx_turboquant_plugin.enable(**SETTINGS)
    codecs = []
    for model in (exact, quantized):
        _, caches = run(model, TOKENS, CHUNKS)
        codecs.append([cache.codec for cache in compressed_parts(caches)])
    assert len(codecs[0]) == (4 if name == "longcat_flash" else 2)
    for one, other in zip(*codecs):
        assert one.spec.dims == (32, 32)
        assert mx.allclose(one.balance, other.balance, rtol=0.1)


def test_how_much_the_channels_of_latents_count_is_measured():
    attention = tiny_models.build("deepseek_v3").layers[0].self_attn
    keys = mx.random.normal((1, 1, 20, 32), key=mx.random.key(0))
    queries = mx.random.normal((1, 4, 20, 16), key=mx.random.key(1))
    found = _summary(attention, [], keys, queries)
    absorbed = mx.einsum("htn,hrn->htr", queries[0, :, 4:], attention.embed_q.weight)
    in_scores = mx.mean(absorbed**2, axis=1)
    in_values = mx.mean(attention.unembed_out.weight**2, axis=(0, 1))
    expected = in_scores / mx.mean(in_scores) + in_values / mx.mean(in_values)
    assert found.mean is None
    assert mx.allclose(found.key_square, mx.mean(keys[0, :, 4:] ** 2, axis=1))
    assert mx.allclose(found.query_square, expected, rtol=1e-4)


def test_a_cache_that_rotates_sees_what_mlx_lms_does():
    model = model_of("deepseek_v3", bypass="identity")
    chunks = 64, 30, 9, 58, 1, 1
    made, caches = run(model, TOKENS, chunks, mlx_lm_cache.make_prompt_cache(model, 80))
    assert [type(cache) for cache in caches] == [RotatingCompressedKVCache] * 2
    mlx_turboquant_plugin.disable()
    expected, _ = run(model, TOKENS, chunks, mlx_lm_cache.make_prompt_cache(model, 80))
    assert error(made, expected) < 1e-4


def test_a_cache_that_rotates_is_not_invariant():
    model = model_of("deepseek_v3", invariant=True)
    caches = mlx_lm_cache.make_prompt_cache(model, 80)
    assert [type(cache) for cache in caches] == [RotatingKVCache] * 2
    assert "TURBOQUANT_INVARIANT" in mlx_turboquant_plugin.status().models[-1]


def test_a_token_takes_28_percent():
    cache = CompressedKVCache(KVCodec(CodecSpec(512, 64, "lloyd-max", 4, *ROTARY_PART)))
    cache.update_and_fetch(mx.ones((1, 1, 1056, 512)), mx.ones((1, 1, 1056, 64)))
    before = sum(codes.nbytes for codes in (*cache.key_codes, *cache.value_codes))
    cache.update_and_fetch(mx.ones((1, 1, 32, 512)), mx.ones((1, 1, 32, 64)))
    after = sum(codes.nbytes for codes in (*cache.key_codes, *cache.value_codes))
    assert (after - before) / 32 == 256 + 1 + 64 + 4


def test_the_indexers_keys_stay_as_they_are():
    model = model_of("deepseek_v32")
    for cache in mlx_lm_cache.make_prompt_cache(model):
        assert [type(one) for one in cache.caches] == [CompressedKVCache, KVCache]
    line = mlx_turboquant_plugin.status().models[-1]
    assert "2 of 2 layers compressed" in line and "values 8 bits affine" in line

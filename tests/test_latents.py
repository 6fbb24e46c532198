"""Models that cache latents, and others whose attention computes with keys as arrays."""

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import _merge_caches
from mlx_lm.models import cache as mlx_lm_cache
from test_models import TOKENS, error, run

import mlx_turboquant_plugin

# An array as its mask; "causal", and a factor for each query; several caches in a layer.
MODELS = ["deepseek_v3", "mistral4", "deepseek_v32", "longcat_flash"]
# The settings that split these tokens into exact and coded ones.
SETTINGS = dict(window=32, sinks=2)


def model_of(name, **settings):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.enable(**SETTINGS, **settings)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_invariant_is_whole_as_in_chunks(name):
    model = model_of(name, invariant=True)
    tokens = TOKENS[:, :140]
    whole, _ = run(model, tokens, (140,))
    for chunks in [(50, 70, 20), (*(1,) * 10, 83, *(1,) * 3, 10, 34)]:
        assert error(run(model, tokens, chunks)[0], whole) < 1e-4


@pytest.mark.parametrize("name", MODELS)
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

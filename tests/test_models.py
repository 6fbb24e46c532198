"""Every architecture of mlx-lm: what is compressed works as the model alone does."""

import importlib.metadata
import pkgutil
import tomllib
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.generate import _merge_caches
from mlx_lm.models import cache as mlx_lm_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache
from mlx_turboquant_plugin.models import table

ROOT = Path(__file__).resolve().parent.parent
MODELS = [*table.FAMILIES, *table.THROUGH]
SETTINGS = dict(window=32, sinks=2, preset="quality")
CHUNKS = (64, 37, 60, 1, 1)
# mlx-lm's own batches of these fail, or depend on the padding.
NO_BATCHES = ["gpt_bigcode", "phi3small"]
TOKENS = mx.random.randint(0, 64, (1, sum(CHUNKS)), key=mx.random.key(7))


def enable(**overrides):
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(**SETTINGS, **overrides)


def run(model, tokens, chunks, caches=None):
    """(logits fp32 (B, N, vocabulary), caches), the tokens fed in ``chunks``."""
    caches = mlx_lm_cache.make_prompt_cache(model) if caches is None else caches
    parts, start = [], 0
    for count in chunks:
        out = model(tokens[:, start : start + count], cache=caches)
        parts.append(out[..., :64])
        mx.eval(parts[-1], [c.state for c in caches])
        start += count
    return mx.concatenate(parts, axis=1).astype(mx.float32), caches


def error(made, expected):
    """Root mean square of the difference, of that of the expected logits around their mean."""
    centred = expected - expected.mean(axis=-1, keepdims=True)
    return (mx.mean((made - expected) ** 2) / mx.mean(centred**2)).sqrt().item()


def compressed_parts(caches):
    """The compressed caches among those of a model, those in lists too."""
    flat = [one for cache in caches for one in getattr(cache, "caches", [cache])]
    return [c for c in flat if isinstance(c, (CompressedKVCache, BatchCompressedKVCache))]


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model(name, tmp_path):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.disable()
    expected, _ = run(model, TOKENS, CHUNKS)

    enable(bypass="identity")
    identity, caches = run(model, TOKENS, CHUNKS)
    assert compressed_parts(caches)
    assert error(identity, expected) < 1e-4

    enable(bypass="bridge")
    bridged, _ = run(model, TOKENS, CHUNKS)
    enable()
    made, caches = run(model, TOKENS, CHUNKS)
    print(name, error(identity, expected), error(made, bridged), error(made, expected))
    # Rounding can tip a code at a threshold.
    assert error(made, bridged) < 0.01
    # Codes were read, and cost what 4 bits cost.
    assert 1e-5 < error(made, expected) < 0.15
    assert any(cache.coded for cache in compressed_parts(caches))

    path = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(path, caches)
    loaded = mlx_lm_cache.load_prompt_cache(path)
    more = TOKENS[:, :5]
    after, caches = run(model, more, (4, 1), caches)
    assert error(run(model, more, (4, 1), loaded)[0], after) < 1e-5

    if mlx_lm_cache.can_trim_prompt_cache(caches):
        assert mlx_lm_cache.trim_prompt_cache(caches, 5) == 5
        again, _ = run(model, more, (4, 1), caches)
        assert error(again, after) < 1e-4

    if name not in NO_BATCHES and all(hasattr(cache, "merge") for cache in caches):
        check_batch(model)


def check_batch(model):
    """Two sequences decode together as each does alone."""
    prompts = TOKENS[:, :120], TOKENS[:, 40:120]
    new = TOKENS[:, 120:123]
    alone, caches = zip(*(run(model, prompt, (prompt.shape[1],)) for prompt in prompts))
    batch = _merge_caches(list(caches))
    together, _ = run(model, mx.concatenate([new, new]), (1, 1, 1), batch)
    for row, single in enumerate(caches):
        expected, _ = run(model, new, (1, 1, 1), single)
        assert error(together[row : row + 1], expected) < 1e-3
        extracted = [cache.extract(row) for cache in batch]
        for one, other in zip(compressed_parts(extracted), compressed_parts(single)):
            assert one.offset == other.offset

"""The compressed cache on the models that ship with the project."""

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import cache as mlx_lm_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache

HERE = Path(__file__).parent
MODELS = [
    HERE.parent / "mlx_turboquant_plugin" / "demo_model",
    HERE / "data" / "tiny-llama",
    HERE / "data" / "tiny-qwen2",
]
LENGTH = 420


def logits(model, tokens, chunk=128, caches=None):
    caches = mlx_lm_cache.make_prompt_cache(model) if caches is None else caches
    parts = []
    for start in range(0, tokens.shape[1], chunk):
        parts.append(model(tokens[:, start : start + chunk], cache=caches))
        mx.eval(parts[-1], [c.state for c in caches])
    return mx.concatenate(parts, axis=1).astype(mx.float32), caches


def kl(exact, other):
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (exact, other))
    return mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)).item()


@pytest.fixture(params=MODELS, ids=lambda path: path.name)
def model(request):
    mlx_turboquant_plugin.disable()
    model, tokenizer = mlx_lm.load(str(request.param))
    model.set_dtype(mx.float32)
    text = (HERE.parent / "mlx_turboquant_plugin/evaluation/demo_prompt.txt").read_text("utf-8")
    tokens = mx.array(tokenizer.encode(text)[:LENGTH])[None]
    yield model, tokens
    mlx_turboquant_plugin.disable()


def test_close_to_exact_and_identity_is_exact(model):
    model, tokens = model
    exact, _ = logits(model, tokens)
    for overrides, bound in (({}, 5e-3), ({"bypass": "identity"}, 1e-6)):
        mlx_turboquant_plugin.enable(**overrides)
        ours, caches = logits(model, tokens)
        mlx_turboquant_plugin.disable()
        assert all(isinstance(c, CompressedKVCache) and c.coded > 0 for c in caches)
        assert kl(exact, ours) < bound
    assert mx.array_equal(logits(model, tokens)[0], exact)


def test_chunks_kernels_and_bridge_agree(model):
    model, tokens = model
    mlx_turboquant_plugin.enable()
    base, _ = logits(model, tokens)
    # A code can flip at a threshold by rounding, so single logits may differ.
    assert kl(base, logits(model, tokens, chunk=37)[0]) < 1e-5
    for overrides in ({"kernel": "eager"}, {"bypass": "bridge"}):
        mlx_turboquant_plugin.disable()
        mlx_turboquant_plugin.enable(**overrides)
        assert kl(base, logits(model, tokens)[0]) < 1e-5


def test_trim_and_save(model, tmp_path):
    model, tokens = model
    mlx_turboquant_plugin.enable()
    _, caches = logits(model, tokens[:, :-20])
    last, _ = logits(model, tokens[:, -20:], caches=caches)
    mlx_lm_cache.trim_prompt_cache(caches, 10)
    again, _ = logits(model, tokens[:, -10:], caches=caches)
    assert kl(last[:, -10:], again) < 1e-5
    path = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(path, caches)
    loaded = mlx_lm_cache.load_prompt_cache(path)
    following = tokens[:, :5]
    expected, _ = logits(model, following, caches=caches)
    assert kl(expected, logits(model, following, caches=loaded)[0]) < 1e-6
    Path(path).write_bytes(Path(path).read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        mlx_lm_cache.load_prompt_cache(path)

"""The bars, on real models beside the project; these tests skip where there are none."""

from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_turboquant_plugin.tools.runs import compressed, compressed_prompt_cache, prompt_cache
from mlx_turboquant_plugin.tools.teacher_forcing import diverge

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOKENS = SHARED / "data" / "wikitext-2" / "test-tokens-8192.npy"

pytestmark = pytest.mark.skipif(not TOKENS.exists(), reason="the zoo of models is not here")


@pytest.fixture(params=["qwen3-zoo", "qwen2-zoo", "llama-zoo"])
def model(request):
    model, _ = mlx_lm.load(str(SHARED / "models" / request.param))
    model.set_dtype(mx.float32)
    return model


def window(number, length):
    """bos and then ``length`` - 1 tokens of the text."""
    tokens = np.load(TOKENS).astype(np.int64)
    step = length - 1
    return mx.array(np.concatenate([tokens[:1], tokens[1 + number * step :][:step]]))


def divergence(model, windows, **settings):
    total = None
    for tokens in windows:
        exact = prompt_cache(model)
        with compressed(**settings):
            one = diverge(model, tokens, 128, exact, compressed_prompt_cache(model))
        total = one if total is None else total + one
    return total


def test_identity_bypass_is_exact(model):
    assert abs(divergence(model, [window(0, 400)], bypass="identity").kl) <= 1e-6


@pytest.mark.slow
def test_quality_of_the_default_preset(model):
    result = divergence(model, [window(i, 2048) for i in range(2)])
    assert result.kl <= 1.5e-3
    assert result.top1 >= 0.98
    assert abs(result.perplexity / result.exact_perplexity - 1) <= 3e-3


@pytest.mark.slow
def test_chunks_do_not_matter(model):
    tokens = window(0, 1024)
    base = log_probabilities(model, tokens, [128] * 8)
    for chunks in ([128] * 7 + [64] + [1] * 64, [100] * 10 + [24], [1024]):
        other = log_probabilities(model, tokens, chunks)
        # Rounding can tip a code at a threshold, so single logits may move.
        kl = mx.sum(mx.exp(base) * (base - other), axis=-1)
        assert mx.mean(kl).item() <= 1e-6
        print(chunks[:1], "mean KL", mx.mean(kl).item(), "max", mx.abs(base - other).max().item())


def log_probabilities(model, tokens, chunks):
    parts, start = [], 0
    with compressed(invariant=True):
        caches = compressed_prompt_cache(model)
        for length in chunks:
            logits = model(tokens[None, start : start + length], cache=caches)[0]
            parts.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            mx.eval(parts[-1], [cache.state for cache in caches])
            start += length
    return mx.concatenate(parts)

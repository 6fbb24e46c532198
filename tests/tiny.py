"""The tiny models that ship with the project, and how tests run them."""

import functools
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models import cache as mlx_lm_cache

ROOT = Path(__file__).resolve().parent.parent
PATHS = {
    "tiny-qwen3": ROOT / "mlx_turboquant_plugin" / "demo_model",
    "tiny-llama": ROOT / "tests" / "data" / "tiny-llama",
    "tiny-qwen2": ROOT / "tests" / "data" / "tiny-qwen2",
}
TEXT = ROOT / "mlx_turboquant_plugin" / "tools" / "demo_prompt.txt"


@functools.cache
def load(name):
    """(model in fp32, tokenizer), loaded once in a test run: tests must not change them."""
    model, tokenizer = mlx_lm.load(str(PATHS[name]))
    model.set_dtype(mx.float32)
    by_columns(model)
    return model, tokenizer


def by_columns(model):
    """Have the columns of weights lie together: MLX's BLAS on Linux is twice as fast then."""
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = mx.contiguous(module.weight.T).T
    mx.eval(model.parameters())


def text_tokens(tokenizer, length):
    """The first ``length`` tokens of some English text, a list."""
    return tokenizer.encode(TEXT.read_text("utf-8"))[:length]


def logits(model, tokens, caches=None, chunk=128):
    """(logits fp32 (B, N, vocabulary), caches) of tokens (B, N), ``chunk`` at a time."""
    caches = mlx_lm_cache.make_prompt_cache(model) if caches is None else caches
    parts = []
    for start in range(0, tokens.shape[1], chunk):
        parts.append(model(tokens[:, start : start + chunk], cache=caches))
        mx.eval(parts[-1], [c.state for c in caches])
    return mx.concatenate(parts, axis=1).astype(mx.float32), caches


def mean_kl(exact, other):
    """Mean KL divergence in nats of two arrays of logits."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (exact, other))
    return mx.mean(mx.sum(mx.exp(p) * (p - q), axis=-1)).item()

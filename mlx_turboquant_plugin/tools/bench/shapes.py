"""Models that can be measured without their weights."""

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...integration.projections import weights_of

# What mlx-lm's loader reads from a config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rope_theta": 5e5,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
}

# Norms of a head's biases, about those of Qwen2.5-0.5B; keys have far larger ones in the
# first and the last layer.
BIASES = {"q_proj": 20.0, "k_proj": 20.0, "v_proj": 1.0}
LARGE_KEY_BIAS = 300.0


def random_model(shape: str) -> nn.Module:
    """A model of one of the ``SHAPES`` with random weights in bfloat16."""
    config = SHAPES[shape]
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs(**config))
    _set_biases(model, config["hidden_size"] // config["num_attention_heads"])
    model.set_dtype(mx.bfloat16)
    # One by one, or all of them would be there in float32 for a while.
    for _, weights in weights_of(model):
        mx.eval(weights)
    return model


def _set_biases(model: nn.Module, head_dim: int) -> None:
    """Give the projections that have biases some like those of a trained model."""
    for layer in model.layers:
        outer = layer is model.layers[0] or layer is model.layers[-1]
        for name, norm in BIASES.items():
            projection = layer.self_attn[name]
            if "bias" in projection:
                norm = LARGE_KEY_BIAS if outer and name == "k_proj" else norm
                deviation = norm / head_dim**0.5
                projection.bias = deviation * mx.random.normal(projection.bias.shape)

"""Balanced keys: how to weigh a key's channels, from the model's weights alone.

After the rotation a key's quantisation error is spread evenly over its channels,
but the query does not weigh them evenly. With keys divided by s and queries
multiplied by it, the error of a score is about sum_c (q_c s_c)^2 sum_c (k_c / s_c)^2,
which is least (Cauchy-Schwarz) where s_c^2 = rms(k_c) / rms(q_c).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def base_linear(projection: nn.Module) -> nn.Module:
    """The linear layer below a LoRA or DoRA adapter, or ``projection`` itself."""
    return getattr(projection, "linear", projection)


def projection_rms(attention: nn.Module, norm: nn.Module, name: str, heads: int) -> mx.array:
    """Root mean square of each output channel of ``attention.<name>``: fp32 (heads, D).

    Its input is a vector of unit mean square times the weight of ``norm``. The bias
    counts for queries; that of keys is kept out of the codes.
    """
    linear = base_linear(getattr(attention, name))
    weight = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        weight = mx.dequantize(
            weight,
            linear.scales,
            linear.get("biases"),
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
        )
    square = mx.sum((weight.astype(mx.float32) * norm.weight.astype(mx.float32)) ** 2, axis=-1)
    if name == "q_proj" and "bias" in linear:
        square = square + linear.bias.astype(mx.float32) ** 2
    return mx.sqrt(square).reshape(heads, -1)


def norm_rms(attention: nn.Module, norm: nn.Module, name: str, heads: int) -> mx.array:
    """The same for models that normalise each head: |weight| of the head's norm."""
    weight = getattr(attention, {"q_proj": "q_norm", "k_proj": "k_norm"}[name]).weight
    return mx.broadcast_to(mx.abs(weight.astype(mx.float32)), (heads, weight.shape[0]))


def balance(key_rms: mx.array, query_rms: mx.array, rope: Any) -> mx.array:
    """The factors s of a layer.

    Args:
        key_rms: (H, D).
        query_rms: (H_q, D).
        rope: the rope object; s is equal within each of its pairs, so that it
            commutes with the rotation by position.

    Returns:
        fp32 (H, 1, D) with geometric mean 1.
    """
    heads, dim = key_rms.shape
    query_square = (query_rms**2).reshape(heads, -1, dim).mean(axis=1)
    ratio = mx.maximum(_pooled(key_rms**2, rope), 1e-20) / mx.maximum(
        _pooled(query_square, rope), 1e-20
    )
    log_s = mx.log(ratio) / 4
    return mx.exp(log_s - mx.mean(log_s, axis=-1, keepdims=True))[:, None]


def _pooled(square: mx.array, rope: Any) -> mx.array:
    """Means of ``square`` (H, D) over the rotary pairs."""
    dim = square.shape[-1]
    rotated = getattr(rope, "dims", getattr(rope, "dim", dim)) if rope is not None else dim
    turned, rest = square[:, :rotated], square[:, rotated:]
    traditional = getattr(rope, "traditional", False)
    shape = (-1, rotated // 2, 2) if traditional else (-1, 2, rotated // 2)
    pairs = turned.reshape(shape)
    pooled = mx.mean(pairs, axis=2 if traditional else 1, keepdims=True)
    pooled = mx.broadcast_to(pooled, pairs.shape).reshape(turned.shape)
    return mx.concatenate([pooled, rest], axis=-1)

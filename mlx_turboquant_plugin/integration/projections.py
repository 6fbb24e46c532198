"""Where an attention module keeps the projections of its queries, keys and values."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def weights_of(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Names and arrays of all weights of a module, those of adapters too."""
    weights: Any = tree_flatten(module.parameters())
    return weights


def entries(holder: Any) -> Iterable[tuple[Any, Any]]:
    """The names and values in a module or a dict; in a list, places stand for names."""
    return holder.items() if isinstance(holder, dict) else enumerate(holder)


def contents(holder: Any) -> Iterator[Any]:
    """The modules and weights below a module, those of adapters too.

    They are those of ``named_modules()`` and ``parameters()``, in a tenth of the time: whoever
    makes a prompt cache waits for it.
    """
    for name, value in entries(holder):
        if isinstance(value, mx.array):
            if not str(name).startswith("_"):
                yield value
        elif isinstance(value, (dict, list)):
            if isinstance(value, nn.Module):
                yield value
            yield from contents(value)


class Projection(NamedTuple):
    """Some or all outputs of a linear layer.

    Attributes:
        linear: dense, quantized or sharded; see :func:`base_linear`.
        rows: which outputs, in the order of heads and channels; None for all.
    """

    linear: nn.Module
    rows: mx.array | None = None

    @property
    def outputs(self) -> int:
        return self.linear.weight.shape[0] if self.rows is None else self.rows.size

    def weight(self, some: slice) -> mx.array:
        """The weights of some outputs, dequantized: fp32 (outputs, inputs)."""
        linear = self.linear
        weight = self._chosen(linear.weight, some)
        if "scales" in linear:
            biases = linear.get("biases")
            weight = mx.dequantize(
                weight,
                self._chosen(linear.scales, some),
                None if biases is None else self._chosen(biases, some),
                group_size=linear.group_size,
                bits=linear.bits,
                mode=getattr(linear, "mode", "affine"),
            )
        return weight.astype(mx.float32)

    def bias(self) -> mx.array | None:
        """The bias, (outputs,), or None."""
        return self._chosen(self.linear.bias) if "bias" in self.linear else None

    def _chosen(self, array: mx.array, some: slice = slice(None)) -> mx.array:
        return array[some] if self.rows is None else array[self.rows[some]]


def base_linear(projection: nn.Module) -> nn.Module:
    """The linear layer below a LoRA or DoRA adapter, or ``projection`` itself."""
    linear: Any = getattr(projection, "linear", projection)
    return linear


def fused_projections(
    linear: nn.Module, heads: int, kv_heads: int, grouped: bool
) -> tuple[Projection, Projection, Projection]:
    """The queries', keys' and values' parts of one projection.

    Args:
        grouped: whether the outputs of each KV head stand together, its queries first,
            then its key and its value; else all queries come before all keys.
    """
    parts: Sequence[np.ndarray]
    every = np.arange(linear.weight.shape[0]).reshape(heads + 2 * kv_heads, -1)
    if grouped:
        groups = every.reshape(kv_heads, -1, every.shape[1])
        parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    else:
        parts = np.split(every, [heads, heads + kv_heads])
    queries, keys, values = (Projection(linear, mx.array(part.flatten())) for part in parts)
    return queries, keys, values

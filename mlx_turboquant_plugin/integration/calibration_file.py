"""Statistics of a model in the user's cache folder, so that they are measured once.

A file that can't be read, or does not fit, is as good as none; where none can be written, the
measuring is repeated by the next process.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..cache_folder import cache_folder
from ..log import logger
from .family import family_of
from .projections import weights_of

FORMAT = "turboquant-statistics/1"
EMBEDDINGS = nn.Embedding, nn.QuantizedEmbedding
# Of a matrix, for the fingerprint.
ROWS = 8


class Statistics(NamedTuple):
    """Keys and queries of one layer, fp32.

    Attributes:
        mean: of the keys before RoPE, (H, D), or None where that can't be told.
        key_square: mean square of what keys differ from it by, (H, D); where there is no mean,
            of the keys after RoPE.
        query_square: mean square of the queries after RoPE, (H_q, D).
    """

    mean: mx.array | None
    key_square: mx.array
    query_square: mx.array

    def usable(self) -> bool:
        """Whether shapes and dtypes fit together, and all can be of keys and queries."""
        arrays = [x for x in self if x is not None]
        heads, dim = self.key_square.shape
        query_heads, query_dim = self.query_square.shape
        return (
            (dim, query_heads % heads) == (query_dim, 0)
            and (self.mean is None or self.mean.shape == (heads, dim))
            and all(x.dtype == mx.float32 and mx.isfinite(x).all().item() for x in arrays)
            and all(bool((x >= 0).all()) and float(x.sum()) > 0 for x in self[1:])
        )


def fingerprint(model: nn.Module, attentions: Sequence[nn.Module | None], tokens: mx.array) -> str:
    """What tells statistics from others: the tokens, the model, and how its keys turn.

    Of the model all shapes and dtypes count, all vectors (biases, norms), and some rows of all
    matrices.
    """
    digest = hashlib.sha256(FORMAT.encode() + bytes(tokens.view(mx.uint8)))
    parts = [_turned(attention) for attention in attentions if attention is not None]
    for name, x in weights_of(model):
        digest.update(f"{name} {x.shape} {x.dtype};".encode())
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x[None]
        parts.append(mx.contiguous(rows[:: max(1, rows.shape[0] // ROWS)]).view(mx.uint8))
    mx.eval(parts)
    for part in parts:
        digest.update(bytes(part))
    return digest.hexdigest()[:32]


def _turned(attention: nn.Module) -> mx.array:
    """What tells the rope of an attention from others."""
    rope: Any = getattr(attention, family_of(attention).rope, None)
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    name = mx.array(np.frombuffer(type(rope).__name__.encode(), np.uint8))
    if not isinstance(dims, int):
        return name
    turned = [rope(mx.ones((1, 1, 2, dims)), offset=start).flatten() for start in (1, 10_000)]
    return mx.concatenate([name, *(x.view(mx.uint8) for x in turned)])


def load(key: str, count: int) -> list[Statistics | None] | None:
    """The statistics of the ``count`` layers of the model with this fingerprint, or None."""
    try:
        path = _path(key)
        if not os.path.exists(path):
            return None
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        found = [_layer(arrays, index) for index in range(count)]
        fits = metadata.get("format") == FORMAT and metadata.get("layers") == str(count)
        if not fits or not all(one.usable() for one in found if one is not None):
            raise ValueError(f"{path} does not fit")
    except Exception as error:  # No home, or a damaged file: MLX raises several kinds.
        logger.info("statistics are not read: %s", error)
        return None
    return found


def _layer(arrays, index: int) -> Statistics | None:
    parts = [arrays.get(f"{index}.{name}") for name in Statistics._fields]
    return Statistics(*parts) if any(x is not None for x in parts) else None


def save(key: str, statistics: Sequence[Statistics | None]) -> None:
    """Keep what was measured, whole or not at all."""
    arrays = {
        f"{index}.{name}": x
        for index, one in enumerate(statistics)
        for name, x in (one._asdict() if one else {}).items()
        if x is not None
    }
    metadata = {"format": FORMAT, "layers": str(len(statistics))}
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, and what rights new files have here.
        written = path.with_name(f"{key}.{os.getpid()}.safetensors")
        try:
            mx.save_safetensors(str(written), arrays, metadata)
            os.replace(written, path)
        finally:
            written.unlink(missing_ok=True)
    except Exception as error:  # A read-only or full disk costs the repetition only.
        logger.info("statistics are not kept: %s", error)


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.safetensors"

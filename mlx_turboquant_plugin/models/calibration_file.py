"""Statistics of a model in the user's cache folder, so that they are measured once.

A file that can't be read, or does not fit, is as good as none; where none can be written, the
measuring is repeated by the next process.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cache_folder import cache_folder
from ..log import logger

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

    mean: Optional[mx.array]
    key_square: mx.array
    query_square: mx.array

    def usable(self) -> bool:
        """Whether all are numbers, and neither keys nor queries are all zeros."""
        arrays = [x for x in self if x is not None]
        return all(mx.isfinite(x).all().item() for x in arrays) and all(
            x.sum().item() > 0 for x in arrays[-2:]
        )


def fingerprint(
    model: nn.Module, attentions: Sequence[Optional[nn.Module]], tokens: mx.array
) -> str:
    """What tells statistics from others: the tokens and the model.

    Of the model all shapes and dtypes count, and what its keys depend on most: of the attentions all vectors (biases, norms) and some rows of all matrices count, of the
    other weights some rows of the embeddings.
    """
    digest = hashlib.sha256(FORMAT.encode() + bytes(tokens.view(mx.uint8)))
    for name, x in tree_flatten(model.parameters()):
        digest.update(f"{name} {x.shape} {x.dtype};".encode())
    modules = [module for _, module in model.named_modules() if isinstance(module, EMBEDDINGS)]
    for module in (*modules, *filter(None, attentions)):
        for _, x in tree_flatten(module.parameters()):
            some = x.flatten() if x.ndim < 2 else x[:: max(1, x.shape[0] // ROWS)]
            digest.update(bytes(mx.contiguous(some).view(mx.uint8)))
    return digest.hexdigest()[:32]


def load(key: str, count: int) -> Optional[List[Optional[Statistics]]]:
    """The statistics of the ``count`` layers of the model with this fingerprint, or None."""
    try:
        path = _path(key)
        if not os.path.exists(path):
            return None
        arrays, metadata = mx.load(str(path), return_metadata=True)
        found = [_layer(arrays, index) for index in range(count)]
        mx.eval(arrays)
    except Exception as error:  # No home, or a damaged file: MLX raises several kinds.
        logger.info("statistics are not read: %s", error)
        return None
    fits = metadata.get("format") == FORMAT and metadata.get("layers") == str(count)
    if not fits or not all(one.usable() for one in found if one is not None):
        logger.info("%s is not used: it does not fit", path)
        return None
    return found


def _layer(arrays, index: int) -> Optional[Statistics]:
    parts = [arrays.get(f"{index}.{name}") for name in Statistics._fields]
    return None if parts[-1] is None else Statistics(*parts)


def save(key: str, statistics: Sequence[Optional[Statistics]]) -> None:
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
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".safetensors")
        os.close(handle)
        try:
            mx.save_safetensors(name, arrays, metadata)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except Exception as error:  # A read-only or full disk costs the repetition only.
        logger.info("statistics are not kept: %s", error)


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.safetensors"

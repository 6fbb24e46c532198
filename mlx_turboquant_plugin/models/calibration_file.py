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


def fingerprint(model: nn.Module, attentions: Sequence[Optional[nn.Module]]) -> str:
    """What tells a model from others: all shapes and dtypes, and some of its keys' weights."""
    digest = hashlib.sha256(FORMAT.encode())
    for name, x in tree_flatten(model.parameters()):
        digest.update(f"{name} {x.shape} {x.dtype};".encode())
    for attention in attentions:
        for name, x in tree_flatten(attention.parameters()) if attention else ():
            if name.endswith("weight") and x.ndim > 1:
                digest.update(bytes(x[:1].view(mx.uint8)))
    return digest.hexdigest()[:32]


def load(key: str, count: int) -> Optional[List[Optional[Statistics]]]:
    """The statistics of the ``count`` layers of the model with this fingerprint, or None."""
    path = _path(key)
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        found = [_layer(arrays, index) for index in range(count)]
        mx.eval(arrays)
    except Exception as error:  # MLX raises several kinds for a damaged file.
        if path.exists():
            logger.info("%s is not used: %s", path, error)
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
    path = _path(key)
    arrays = {
        f"{index}.{name}": x
        for index, one in enumerate(statistics)
        for name, x in (one._asdict() if one else {}).items()
        if x is not None
    }
    metadata = {"format": FORMAT, "layers": str(len(statistics))}
    try:
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
        logger.info("%s is not written: %s", path, error)


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.safetensors"

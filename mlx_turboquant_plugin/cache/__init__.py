"""The caches that replace mlx-lm's."""

from .batch import BatchCompressedKVCache
from .batch_view import BatchView, RowView
from .batched_rows import BatchedRows
from .compressed import CompressedKVCache
from .rotating import RotatingCompressedKVCache
from .view import View
from .visibility import Visibility

__all__ = [
    "BatchCompressedKVCache",
    "BatchView",
    "BatchedRows",
    "CompressedKVCache",
    "RotatingCompressedKVCache",
    "RowView",
    "View",
    "Visibility",
]

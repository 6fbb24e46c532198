"""The caches that replace mlx-lm's."""

from .batch import BatchCompressedKVCache
from .batch_view import BatchView, RowView
from .compressed import CompressedKVCache
from .packed import PackedRows
from .rotating import RotatingCompressedKVCache
from .view import View
from .visibility import Visibility

__all__ = [
    "BatchCompressedKVCache",
    "BatchView",
    "CompressedKVCache",
    "PackedRows",
    "RotatingCompressedKVCache",
    "RowView",
    "View",
    "Visibility",
]

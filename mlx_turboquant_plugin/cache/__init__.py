"""The caches that replace mlx-lm's."""

from .compressed import CompressedKVCache
from .visibility import Visibility

__all__ = ["CompressedKVCache", "Visibility"]

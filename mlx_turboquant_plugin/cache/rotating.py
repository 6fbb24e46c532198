"""The compressed KV cache of one sequence that forgets: for ``max_kv_size``."""

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from ..codecs.kv_codec import KVCodec
from ..per_thread import release
from .compressed import CompressedKVCache
from .visibility import BLOCK, Ring, Visibility


class RotatingCompressedKVCache(CompressedKVCache):
    """Stands where mlx-lm's RotatingKVCache would, and sees what that one sees.

    The sinks are the tokens that are kept. Of the others as many are there as fit into
    ``max_size``, the newest in full precision.

    Args:
        max_size: the number of tokens to hold.
        keep: how many of them are the first tokens.
        codec, visibility, kernel: as in :class:`CompressedKVCache`, but for the number
            of sinks.
    """

    def __init__(
        self,
        max_size: int,
        keep: int = 0,
        codec: KVCodec | None = None,
        visibility: Visibility = Visibility(),
        kernel: str = "eager",
    ):
        super().__init__(codec, visibility._replace(sinks=keep), kernel)
        self.ring = Ring(max_size, keep)

    @property
    def max_size(self) -> int:
        return self.ring.max_size

    @property
    def keep(self) -> int:
        return self.ring.keep

    def _forget(self, is_step: bool) -> None:
        super()._forget(is_step)
        _, oldest = self.ring.oldest(self.offset - 1, 0)
        self._drop_full(oldest - self.full_start)
        if self.full_start > max(self.quantized, self.keep):
            # The ring is so small that tokens leave it before they need codes.
            self.key_codes = self.value_codes = ()
            self.first_quantized = self.quantized = self.full_start
        drop = (oldest - self.first_quantized) // BLOCK * BLOCK
        if drop > 0 and self.key_codes:
            self.first_quantized += drop
            left = self.first_quantized < self.quantized
            keys, values = (codes if left else () for codes in (self.key_codes, self.value_codes))
            self.key_codes = tuple(mx.contiguous(x[..., drop:]) for x in keys)
            self.value_codes = tuple(mx.contiguous(x[..., drop:, :]) for x in values)

    def is_trimmable(self) -> bool:
        return self.offset < self.max_size

    def size(self) -> int:
        return min(self.offset, self.max_size)

    def to_exact(self) -> RotatingKVCache:  # type: ignore[override]
        """mlx-lm's RotatingKVCache with the same tokens, the codes dequantized."""
        cache = RotatingKVCache(self.max_size, self.keep)
        if not self.empty():
            cache.keys, cache.values = map(mx.contiguous, self.keys_and_values())
            cache.offset, cache._idx = self.offset, cache.keys.shape[2]
            release((cache.keys, cache.values))
        return cache

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        if window_size not in (None, self.max_size):
            raise ValueError(
                f"a sliding window of {window_size} tokens over a compressed cache of "
                f"{self.max_size} is not supported: they must be the same, or opt the model out"
            )
        return self.ring.mask(self.offset, N, return_array)

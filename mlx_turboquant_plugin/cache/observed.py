"""A cache that keeps what a model's attention is given, for calibration."""

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class ObservedKVCache(KVCache):
    """mlx-lm's KVCache, which remembers the queries of all passes."""

    def __init__(self):
        super().__init__()
        self._queries: list[mx.array] = []

    def observe(self, queries: mx.array) -> None:
        """Remember the queries (B, H_q, N, D) of a pass."""
        self._queries.append(queries)

    @property
    def seen(self) -> tuple[mx.array | None, mx.array | None]:
        """Keys (B, H, T, D) and queries (B, H_q, T, D), or None where there are none."""
        if self.keys is None or not self._queries:
            return None, None
        return self.keys[:, :, : self.offset], mx.concatenate(self._queries, axis=2)

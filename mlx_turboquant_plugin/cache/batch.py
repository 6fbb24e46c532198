"""The compressed KV cache of a batch of sequences."""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..codecs.kv_codec import KVCodec
from ..per_thread import release
from .batch_view import BatchView, RowView, batch_mask, side_by_side
from .batched_rows import BatchedRows
from .causal import made
from .compressed import CompressedKVCache
from .copies import shared, unpickled_batch
from .encoding import encode_ahead
from .joining import alone, check_alike, check_padding, row_of, rows_of
from .reading import AttendedCache
from .rotating import RotatingCompressedKVCache
from .rows import Part, append_rows, own_tokens
from .shapes import check_rows
from .transaction import AllOrNothing
from .trimming import whole_number
from .visibility import Ring


class BatchCompressedKVCache(AttendedCache):
    """Stands where mlx-lm's BatchKVCache would: each row is a cache of its own.

    Rows hold no padding. Joining, leaving, splitting and padding move rows and copy
    nothing, and what a row holds never depends on its neighbours. While every row
    grows by one token at a time they stand side by side in the same arrays, so that one
    attention serves them all.

    Args:
        left_padding: the padding of each row, as in BatchKVCache.

    Attributes:
        offset: int32 (B,), the position of each row's next token; negative in padding.
        left_padding: int32 (B,), as BatchKVCache would count it.
    """

    def __init__(self, left_padding: Sequence[int]):
        self._rows: list[CompressedKVCache] = [CompressedKVCache() for _ in left_padding]
        self._batched: BatchedRows | None = None
        self._left_padding = list(left_padding)
        self._index = 0
        self._lengths: list[int] | None = None
        self.attention = None

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> "BatchCompressedKVCache":
        """The batch of single caches: compressed ones and mlx-lm's own, filled or empty.

        Raises:
            TypeError: a cache is of another kind.
            ValueError: some of them rotate and others don't, or not at the same size.
        """
        rows = [row_of(cache) for cache in caches]
        check_alike(rows)
        batch = cls._holding(rows, [row.offset for row in rows], max(row.offset for row in rows))
        ours = (cache for cache in caches if isinstance(cache, CompressedKVCache))
        batch.reading = next((cache.reading for cache in ours), cls.reading)
        return batch

    @classmethod
    def of(cls, batch: Any) -> "BatchCompressedKVCache":
        """A batch of mlx-lm's as one of these, its tokens in full precision; these as they are.

        Raises:
            TypeError, ValueError: see :func:`joining.rows_of`.
        """
        return batch if isinstance(batch, cls) else cls._holding(*rows_of(batch))

    @classmethod
    def take_over(cls, batch: Any, other: "BatchCompressedKVCache") -> None:
        """Add the rows of ``other`` to a batch of mlx-lm's, which becomes one of these.

        In place, as mlx-lm extends: whoever holds ``batch`` goes on with it.

        Raises:
            TypeError, ValueError: see :meth:`extend`.
        """
        joined = cls.of(batch)
        joined.extend(other)
        joined.reading = other.reading
        batch.__class__, batch.__dict__ = cls, joined.__dict__

    @classmethod
    def _holding(
        cls, rows: list[CompressedKVCache], offsets: Sequence[int], index: int
    ) -> "BatchCompressedKVCache":
        batch = cls([index - offset for offset in offsets])
        batch._rows, batch._index = rows, index
        return batch

    @property
    def rows(self) -> list[CompressedKVCache]:
        """The cache of each sequence."""
        if self._batched is not None:
            self._separate_rows()
            release(self.arrays)
        return self._rows

    def _separate_rows(self) -> list[CompressedKVCache]:
        if self._batched is not None:
            self._rows, self._batched = self._batched.rows(), None
        return self._rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values and return all that the cache holds.

        Args:
            keys, values: (B, H, N, D).

        Returns:
            Keys and values (B, H, T, D), zeros in the padding, the codes dequantized.
            Inside a patched attention, if that reads the codes instead, ``keys`` and
            ``values`` as given.

        Raises:
            ValueError: see :meth:`CompressedKVCache.append`; no row has changed then.
            RuntimeError: see :meth:`settle`.
        """
        check_rows(keys.shape, values.shape, len(self._left_padding))
        if self.attending:
            return self.leave(self._append(keys, values), keys, values)
        with AllOrNothing(*self.holders):
            view = self._append(keys, values)
        return self.leave(view, keys, values) if self.hooked else self.fetch(view)

    def _append(self, keys: mx.array, values: mx.array) -> BatchView:
        count = keys.shape[2]
        if count == 1 and self._lengths is None and self._index >= max(self._left_padding):
            rows = self._append_batched(keys, values)
        else:
            rows = append_rows(self._separate_rows(), keys, values, self._own_tokens(count))
        new = keys, values
        view = BatchView(rows, self._index, new, tuple(self._left_padding), self._ring)
        self._index += count
        return view

    def _own_tokens(self, count: int) -> list[Part]:
        """Which of the next ``count`` tokens belong to each row."""
        return own_tokens(count, self._index, self._left_padding, self._lengths)

    def _append_batched(self, keys: mx.array, values: mx.array) -> BatchedRows | list[RowView]:
        if self._batched is None:
            self._batch_rows()
        if self._batched is None:
            return append_rows(self._rows, keys, values, [(0, 1)] * len(self._rows))
        self._batched.append(keys, values)
        if self._batched.needs_codes():
            for row in self._separate_rows():
                encode_ahead(row)
            self._batch_rows()
        return self._batched

    def _batch_rows(self) -> None:
        self._batched = BatchedRows.of(self._rows)
        if self._batched is not None:
            # Or every code would be there twice.
            self._rows = []

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values, zeros in the padding, (B, H, T, D) in the model's dtype."""
        if self.attending and self.whole and self.fetched is not None:
            return self.fetched
        # Only to look at: batched rows stay batched.
        rows = self._rows if self._batched is None else self._batched.rows()
        views = [None if row.empty() else row.newest_view() for row in rows]
        tokens = next(view.full_tokens for view in views if view is not None)
        like = tokens.keys, tokens.values
        return side_by_side(views, self._left_padding, self._index, like)

    def bind(self, codec: KVCodec, *known: Any) -> None:
        """Adopt what is known about the attention module; see :class:`CompressedKVCache`."""
        for row in self.rows:
            row.bind(codec, *known)

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Expect padding in the next tokens; arguments as in BatchKVCache."""
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    "Left padding can only be added to an empty BatchCompressedKVCache"
                )
            self._left_padding = [
                a + b for a, b in zip(self._left_padding, left_padding, strict=True)
            ]
        if right_padding is not None and max(right_padding) > 0:
            self._lengths = [
                self._index - left + length
                for length, left in zip(lengths, self._left_padding, strict=True)
            ]

    def finalize(self) -> None:
        """The padding on the right has been processed: it counts as left padding now."""
        if self._lengths is not None:
            # Rows that an interrupted prompt left shorter than was announced have none.
            self._left_padding = [
                max(left, self._index - length)
                for left, length in zip(self._left_padding, self._lengths)
            ]
            self._lengths = None

    def filter(self, batch_indices) -> None:
        """Keep just the rows with the given indices, each as often as it is named."""
        rows, kept = self.rows, _ints(batch_indices)
        self._rows = [shared(rows[i]) for i in kept]
        self._left_padding = [self._left_padding[i] for i in kept]
        if self._lengths is not None:
            self._lengths = [self._lengths[i] for i in kept]
        least = min(self._left_padding, default=0)
        if least > 0:
            self._index -= least
            self._left_padding = [padding - least for padding in self._left_padding]

    def extend(self, other: Any) -> None:
        """Add the rows of another batch; those of mlx-lm's stay in full precision.

        Raises:
            TypeError, ValueError: they can't join, see :meth:`merge`; no batch has changed then.
        """
        other = self.of(other)
        for batch in (self, other):
            batch.check_whole()
        check_padding(self._lengths or other._lengths)
        # The other batch may go on, too.
        rows = [*self.rows, *map(shared, other.rows)]
        check_alike(rows)
        index = max(self._index, other._index)
        self._left_padding = [
            padding + index - batch._index
            for batch in (self, other)
            for padding in batch._left_padding
        ]
        self._rows = rows
        self._index = index
        # The new rows may not know yet which layer they serve.
        self.attention = None

    def extract(self, idx: int) -> Any:
        """The cache of one sequence, sharing nothing with the batch; mlx-lm's own if it was one."""
        self.check_whole()
        return alone(self.rows[idx])

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row, at most all of the longest row.

        Raises:
            ValueError: see :meth:`CompressedKVCache.trim`; or padding on the right is expected.
        """
        n = max(0, min(self._index, whole_number(n)))
        if n and self._lengths is not None:
            raise ValueError(
                "a BatchCompressedKVCache that expects padding on the right can't be trimmed, "
                "since its rows do not grow alike: call finalize() first"
            )
        rows = self.rows
        with AllOrNothing(self, *rows):
            for row in rows:
                row.trim(n)
            self._index -= n
        return n

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def size(self) -> int:
        return self._index

    def empty(self) -> bool:
        return self._batched is None and all(row.empty() for row in self._rows)

    def columns(self, count: int) -> int:
        """T of a mask (B, H, N, T) for the next ``count`` tokens, padding included."""
        return self._index + count

    def cuts(self, count: int) -> list[int]:
        """See :meth:`CompressedKVCache.cuts`: of all rows."""
        found: set[int] = set()
        for row, (first, last) in zip(self.rows, self._own_tokens(count)):
            if not row.visibility.is_prompt(count):
                found.update(first + cut for cut in row.cuts(last - first))
        return sorted(found)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """The mask of BatchKVCache; for rings what each sees, if no other window is asked for."""
        ring, padding = self._ring, tuple(self._left_padding)
        if not window_size or (ring and window_size == ring.max_size):
            mask = batch_mask(N, self._index, padding, ring=ring)
        else:
            mask = batch_mask(N, self._index, padding, window=window_size)
        made(mask)
        return mask

    @property
    def _ring(self) -> Ring | None:
        # Rings are never batched.
        return self._rows[0].ring if self._rows else None

    @property
    def offset(self) -> mx.array:
        # An array of one's own: arithmetic in place changes it.
        return mx.array(_positions(self._index, tuple(self._left_padding)))

    @offset.setter
    def offset(self, v: mx.array):
        raise AttributeError(
            "the offset of a BatchCompressedKVCache can't be set, since its rows go by their "
            "tokens: use trim(n), which all rows share"
        )

    @property
    def left_padding(self) -> mx.array:
        return mx.array(self._left_padding)

    @property
    def keys(self) -> mx.array | None:
        """Full-precision keys, of the first row unless batched: callers hang dependencies here."""
        holder = self._batched if self._batched is not None else self._rows[0]
        return holder.keys

    @keys.setter
    def keys(self, v: mx.array):
        holder = self._batched if self._batched is not None else self._rows[0]
        holder.keys = v

    @property
    def nbytes(self) -> int:
        """Every byte of all rows."""
        if self._batched is not None:
            return self._batched.nbytes
        return sum(row.nbytes for row in self._rows)

    @property
    def holders(self) -> tuple[Any, ...]:
        """See :attr:`CompressedKVCache.holders`."""
        return (self, *self._rows) if self._batched is None else (self, self._batched)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays that it holds."""
        return tuple(array for holder in self.holders[1:] for array in holder.arrays)

    @property
    def state(self):
        self.check_whole()
        rows = [(type(row).__name__, row.state) for row in self.rows]
        return self._index, self._left_padding, rows, self._lengths

    @state.setter
    def state(self, v):
        # Older files have no lengths.
        index, left_padding, rows, *lengths = v
        BatchCompressedKVCache.__init__(self, left_padding)
        self._index = index
        self._lengths = next(iter(lengths), None)
        self._rows = [_KINDS[kind].from_state(state) for kind, state in rows]

    def __copy__(self):
        other = shared(self)
        other._rows = list(map(shared, self._rows))
        other._batched = self._batched and shared(self._batched)
        return other

    def __deepcopy__(self, memo):
        return self.__copy__()

    def __reduce__(self):
        self.check_whole()
        place = self._index, self._left_padding, self._lengths
        return unpickled_batch, (type(self), self.rows, *place)


_KINDS = {kind.__name__: kind for kind in (CompressedKVCache, RotatingCompressedKVCache)}


# All layers ask for the same. By way of NumPy, since lazy arrays must not be shared by threads.
@functools.lru_cache(maxsize=4)
def _positions(index: int, left_padding: tuple[int, ...]) -> mx.array:
    return mx.array(np.array([index - padding for padding in left_padding], np.int32))


def _ints(indices: Any) -> list[int]:
    listed: Any = indices.tolist() if isinstance(indices, mx.array) else list(indices)
    return listed


CompressedKVCache.batch_type = BatchCompressedKVCache

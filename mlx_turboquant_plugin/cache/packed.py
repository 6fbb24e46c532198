"""The rows of a batch side by side in arrays, for decoding."""

import functools
from collections.abc import Sequence

import mlx.core as mx

from ..backends import Backend
from ..codecs.kv_codec import Codes, KVCodec
from .compressed import CompressedKVCache
from .copies import shared
from .exact import ExactTokens
from .shapes import check_shapes
from .view import View
from .visibility import Visibility


class PackedRows:
    """Several sequences that grow by one token each.

    Args:
        model: one of the rows; the others have the same codec, window and kernel.

    Attributes:
        exact_tokens: the S sinks, then the newest tokens of each row, the very newest
            last. What stands before a row's own tokens has no meaning.
        key_codes, value_codes: of the positions 0, 1, ... of every row, followed by
            zeros in rows that have fewer codes.
        first_coded: 0, the position of the first code.
        lengths: the number of tokens of each row.
        coded: the number of tokens of each row that are held as codes.
        exact_start: the position of each row's first exact token after the sinks.
    """

    first_coded = 0

    def __init__(
        self,
        model: CompressedKVCache,
        exact_tokens: ExactTokens,
        key_codes: Codes,
        value_codes: Codes,
        lengths: Sequence[int],
        coded: Sequence[int],
        exact_start: Sequence[int],
    ):
        self._model = model.emptied()
        self.exact_tokens = exact_tokens
        self.key_codes, self.value_codes = key_codes, value_codes
        self.lengths, self.coded = tuple(lengths), tuple(coded)
        self.exact_start = tuple(exact_start)
        self._steps = self._steps_until_codes()

    @classmethod
    def of(cls, rows: Sequence[CompressedKVCache]) -> "PackedRows | None":
        """Pack ``rows``, or None: too short ones, or ones that were not encoded alike."""
        if not rows or not all(_alike(row, rows[0]) for row in rows):
            return None
        exact = [row.exact_tokens for row in rows]
        keys = _side_by_side([tokens.keys for tokens in exact], rows[0].visibility.sinks)
        values = _side_by_side([tokens.values for tokens in exact], rows[0].visibility.sinks)
        longest = max(rows, key=lambda row: row.coded)
        return cls(
            rows[0],
            ExactTokens(keys, values),
            _stack([row.key_codes for row in rows], longest.key_codes, -1),
            _stack([row.value_codes for row in rows], longest.value_codes, -2),
            [row.offset for row in rows],
            [row.coded for row in rows],
            [row.exact_start for row in rows],
        )

    @property
    def codec(self) -> KVCodec:
        return self._model.codec

    @property
    def visibility(self) -> Visibility:
        return self._model.visibility

    @property
    def backend(self) -> Backend:
        return self._model.backend

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Append one token (B, H, 1, D) to every row.

        Raises:
            ValueError: see :meth:`CompressedKVCache.append`.
        """
        check_shapes(keys.shape, values.shape, self.codec.spec, self.exact_tokens.heads)
        sinks = self.visibility.sinks
        drop = max(0, self.exact_tokens.count + 1 - sinks - self.visibility.most_exact)
        self.exact_tokens = self.exact_tokens.grown(keys, values, sinks, drop)
        held = self.exact_tokens.count - sinks
        self.lengths, self.exact_start = _grown(self.lengths, self.exact_start, held)
        self._steps -= 1

    @property
    def keys(self) -> mx.array:
        """Exact keys, (B, H, S + E, D)."""
        return self.exact_tokens.keys

    @keys.setter
    def keys(self, v: mx.array):
        self.exact_tokens = self.exact_tokens.replaced(v, self.values)

    @property
    def values(self) -> mx.array:
        """Exact values, (B, H, S + E, D)."""
        return self.exact_tokens.values

    def needs_codes(self) -> bool:
        """Whether the newest token of some row sees tokens as codes that have none yet."""
        return self._steps <= 0

    def _steps_until_codes(self) -> int:
        """After how many more tokens some row needs codes."""
        visibility = self.visibility
        return min(
            visibility.first_without(max(coded, visibility.sinks)) - (length - 1)
            for length, coded in zip(self.lengths, self.coded)
        )

    @property
    def apart(self) -> "PackedRows":
        """See :attr:`View.apart`."""
        other = shared(self)
        other.exact_tokens = self.exact_tokens.apart()
        return other

    def rows(self) -> list[CompressedKVCache]:
        """The rows as caches of their own."""
        return [self._row(i) for i in range(len(self.lengths))]

    def views(self) -> list[View]:
        """What the newest token of each row sees, row by row."""
        return [row.newest_view() for row in self.rows()]

    def _row(self, index: int) -> CompressedKVCache:
        own, sinks = slice(index, index + 1), self.visibility.sinks
        length, coded = self.lengths[index], self.coded[index]
        tokens = length - self.exact_start[index]
        keys, values = (
            mx.concatenate([x[own, :, :sinks], x[own, :, x.shape[2] - tokens :]], axis=2)
            for x in (self.keys, self.values)
        )
        key_codes: Codes = ()
        value_codes: Codes = ()
        if coded:
            key_codes = tuple(x[own, :, :, :coded] for x in self.key_codes)
            value_codes = tuple(x[own, :, :coded] for x in self.value_codes)
        row = self._model.emptied()
        row.hold(ExactTokens(keys, values), key_codes, value_codes, 0, coded, length)
        return row

    @property
    def nbytes(self) -> int:
        codes = (*self.key_codes, *self.value_codes)
        return self.exact_tokens.nbytes + sum(array.nbytes for array in codes)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays that it holds, exact tokens joined or not."""
        return *self.exact_tokens.arrays, *self.key_codes, *self.value_codes


# All layers ask for the same.
@functools.lru_cache(maxsize=4)
def _grown(
    lengths: tuple[int, ...], exact_start: tuple[int, ...], held: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of rows that are one token longer, and what is exact if they hold ``held``."""
    lengths = tuple(length + 1 for length in lengths)
    return lengths, tuple(max(x, length - held) for x, length in zip(exact_start, lengths))


def _alike(row: CompressedKVCache, other: CompressedKVCache) -> bool:
    return (
        type(row) is CompressedKVCache
        and row.codec is other.codec
        and row.visibility == other.visibility
        and row.backend is other.backend
        and row.offset >= row.visibility.sinks
        and not row.empty()
        and row.exact_tokens.dtypes == other.exact_tokens.dtypes
    )


def _side_by_side(arrays: Sequence[mx.array], sinks: int) -> mx.array:
    """Sinks at the left, newest tokens at the right, (B, H, S + E, D)."""
    longest = max(x.shape[2] for x in arrays)
    rows = []
    for x in arrays:
        gap = mx.zeros((1, x.shape[1], longest - x.shape[2], x.shape[3]), x.dtype)
        rows.append(mx.concatenate([x[:, :, :sinks], gap, x[:, :, sinks:]], axis=2))
    return mx.concatenate(rows)


def _stack(rows: Sequence[Codes], longest: Codes, axis: int) -> Codes:
    """Codes (B, ...), shorter rows filled up with zeros along ``axis``."""
    planes = []
    for index, model in enumerate(longest):
        filled = []
        for codes in rows:
            plane = codes[index] if codes else None
            shape = list(model.shape)
            shape[axis] -= plane.shape[axis] if codes else 0
            zeros = mx.zeros(shape, model.dtype)
            filled.append(mx.concatenate([plane, zeros], axis=axis) if codes else zeros)
        planes.append(mx.concatenate(filled))
    return tuple(planes)

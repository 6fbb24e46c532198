"""The rows of a batch side by side in arrays, for decoding."""

import functools
from collections.abc import Sequence

import mlx.core as mx

from ..backends import Backend
from ..codecs.kv_codec import Codes, KVCodec
from .compressed import CompressedKVCache
from .copies import shared
from .full_precision import FullPrecisionTokens
from .shapes import check_shapes
from .view import View
from .visibility import Visibility


class BatchedRows:
    """Several sequences that grow by one token each.

    Args:
        template: one of the rows; the others have the same codec, window and kernel.

    Attributes:
        full_tokens: the S sinks, then the newest tokens of each row, the very newest
            last. What stands before a row's own tokens has no meaning.
        key_codes, value_codes: of the positions 0, 1, ... of every row, followed by
            zeros in rows that have fewer codes.
        first_quantized: 0, the position of the first code.
        lengths: the number of tokens of each row.
        quantized: the number of tokens of each row that are held as codes.
        full_start: the position of each row's first full-precision token after the sinks.
    """

    first_quantized = 0

    def __init__(
        self,
        template: CompressedKVCache,
        full_tokens: FullPrecisionTokens,
        key_codes: Codes,
        value_codes: Codes,
        lengths: Sequence[int],
        quantized: Sequence[int],
        full_start: Sequence[int],
    ):
        self._template = template.emptied()
        self.full_tokens = full_tokens
        self.key_codes, self.value_codes = key_codes, value_codes
        self.lengths, self.quantized = tuple(lengths), tuple(quantized)
        self.full_start = tuple(full_start)
        self._steps = self._steps_until_codes()

    @classmethod
    def of(cls, rows: Sequence[CompressedKVCache]) -> "BatchedRows | None":
        """Batch ``rows``, or None: too short ones, or ones that were not encoded alike."""
        if not rows or not all(_alike(row, rows[0]) for row in rows):
            return None
        full = [row.full_tokens for row in rows]
        keys = _side_by_side([tokens.keys for tokens in full], rows[0].visibility.sinks)
        values = _side_by_side([tokens.values for tokens in full], rows[0].visibility.sinks)
        longest = max(rows, key=lambda row: row.quantized)
        return cls(
            rows[0],
            FullPrecisionTokens(keys, values),
            _stack([row.key_codes for row in rows], longest.key_codes, -1),
            _stack([row.value_codes for row in rows], longest.value_codes, -2),
            [row.offset for row in rows],
            [row.quantized for row in rows],
            [row.full_start for row in rows],
        )

    @property
    def codec(self) -> KVCodec:
        return self._template.codec

    @property
    def visibility(self) -> Visibility:
        return self._template.visibility

    @property
    def backend(self) -> Backend:
        return self._template.backend

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Append one token (B, H, 1, D) to every row.

        Raises:
            ValueError: see :meth:`CompressedKVCache.append`.
        """
        check_shapes(keys.shape, values.shape, self.codec.spec, self.full_tokens.heads)
        sinks = self.visibility.sinks
        drop = max(0, self.full_tokens.count + 1 - sinks - self.visibility.most_full_tokens)
        self.full_tokens = self.full_tokens.grown(keys, values, sinks, drop)
        held = self.full_tokens.count - sinks
        self.lengths, self.full_start = _grown(self.lengths, self.full_start, held)
        self._steps -= 1

    @property
    def keys(self) -> mx.array:
        """Full-precision keys, (B, H, S + E, D)."""
        return self.full_tokens.keys

    @keys.setter
    def keys(self, v: mx.array):
        self.full_tokens = self.full_tokens.replaced(v, self.values)

    @property
    def values(self) -> mx.array:
        """Full-precision values, (B, H, S + E, D)."""
        return self.full_tokens.values

    def needs_codes(self) -> bool:
        """Whether the newest token of some row sees tokens as codes that have none yet."""
        return self._steps <= 0

    def _steps_until_codes(self) -> int:
        """After how many more tokens some row needs codes."""
        visibility = self.visibility
        return min(
            visibility.first_without(max(quantized, visibility.sinks)) - (length - 1)
            for length, quantized in zip(self.lengths, self.quantized)
        )

    @property
    def apart(self) -> "BatchedRows":
        """See :attr:`View.apart`."""
        other = shared(self)
        other.full_tokens = self.full_tokens.apart()
        return other

    def rows(self) -> list[CompressedKVCache]:
        """The rows as caches of their own."""
        return [self._row(i) for i in range(len(self.lengths))]

    def views(self) -> list[View]:
        """What the newest token of each row sees, row by row."""
        return [row.newest_view() for row in self.rows()]

    def _row(self, index: int) -> CompressedKVCache:
        own, sinks = slice(index, index + 1), self.visibility.sinks
        length, quantized = self.lengths[index], self.quantized[index]
        tokens = length - self.full_start[index]
        keys, values = (
            mx.concatenate([x[own, :, :sinks], x[own, :, x.shape[2] - tokens :]], axis=2)
            for x in (self.keys, self.values)
        )
        key_codes: Codes = ()
        value_codes: Codes = ()
        if quantized:
            key_codes = tuple(x[own, :, :, :quantized] for x in self.key_codes)
            value_codes = tuple(x[own, :, :quantized] for x in self.value_codes)
        row = self._template.emptied()
        row.hold(FullPrecisionTokens(keys, values), key_codes, value_codes, 0, quantized, length)
        return row

    @property
    def nbytes(self) -> int:
        codes = (*self.key_codes, *self.value_codes)
        return self.full_tokens.nbytes + sum(array.nbytes for array in codes)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All arrays that it holds, full-precision tokens joined or not."""
        return *self.full_tokens.arrays, *self.key_codes, *self.value_codes


# All layers ask for the same.
@functools.lru_cache(maxsize=4)
def _grown(
    lengths: tuple[int, ...], full_start: tuple[int, ...], held: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of rows one token longer, and where full precision begins if they hold ``held``."""
    lengths = tuple(length + 1 for length in lengths)
    return lengths, tuple(max(x, length - held) for x, length in zip(full_start, lengths))


def _alike(row: CompressedKVCache, other: CompressedKVCache) -> bool:
    return (
        type(row) is CompressedKVCache
        and row.codec is other.codec
        and row.visibility == other.visibility
        and row.backend is other.backend
        and row.offset >= row.visibility.sinks
        and not row.empty()
        and row.full_tokens.dtypes == other.full_tokens.dtypes
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

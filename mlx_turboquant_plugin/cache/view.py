"""What the attention of one forward pass reads from a cache."""

from typing import NamedTuple

import mlx.core as mx

from ..codecs.kv_codec import Codes, KVCodec
from .exact import ExactTokens
from .visibility import Ring, Visibility


class View(NamedTuple):
    """One layer's keys and values as the queries of one forward pass find them.

    Attributes:
        kernel: what runs the attention.
        exact_tokens: the sinks, then the positions ``exact_start``, ..., ``end`` - 1.
        key_codes, value_codes: of the positions ``first_coded``, ..., ``coded`` - 1.
        start: position of the first query.
        end: one more than the position of the last query.
        is_prompt: whether all queries read exactly what the first does, see
            :class:`Visibility`.
        ring: how far back queries see, or None for all the way.
        laid_out: keys and values (B, H, T, D), sinks, decoded and exact tokens, if they
            have been put side by side already.
    """

    codec: KVCodec
    visibility: Visibility
    kernel: str
    exact_tokens: ExactTokens
    key_codes: Codes
    value_codes: Codes
    first_coded: int
    coded: int
    start: int
    end: int
    is_prompt: bool
    ring: Ring | None = None
    laid_out: tuple[mx.array, mx.array] | None = None

    @property
    def queries(self) -> int:
        """The number of queries."""
        return self.end - self.start

    @property
    def sinks(self) -> int:
        return min(self.visibility.sinks, self.end)

    @property
    def exact_start(self) -> int:
        """Position of the first exact token after the sinks."""
        return self.end - (self.exact_tokens.count - self.sinks)

    def exact_from(self, position: int) -> int:
        """The first position, after the sinks, that a query at ``position`` reads exactly.

        After a long trim some tokens are only there as codes that would have been exact.
        """
        if self.is_prompt:
            position = self.start
        return max(self.visibility.exact_from(position), self.exact_start)

    @property
    def columns(self) -> int | None:
        """See :meth:`CompressedKVCache.columns`."""
        if self.ring is None:
            return self.end
        return self.ring.columns(self.start, self.queries)

    @property
    def forgets(self) -> bool:
        """Whether some query sees less of the past than the first."""
        return self.ring is not None and self.oldest(self.end - 1 - self.start)[0] > 0

    def slot(self, position: int) -> int:
        """Where a token from ``exact_start`` on stands among the exact ones."""
        return position - self.exact_start + self.sinks

    def oldest(self, query):
        """Positions of the oldest sink and the oldest later token that a query sees.

        Args:
            query: the number of the query, or an array of such numbers.
        """
        if self.ring is None:
            return 0, self.sinks
        return self.ring.oldest(self.start, query)

    def knows(self, mask: str | mx.array | None) -> bool:
        """Whether ``mask`` is what a ring itself made for this pass."""
        return mask is self.ring.mask(self.start, self.queries, isinstance(mask, mx.array))

    @property
    def apart(self) -> "View":
        """The same, to be read without joining exact tokens that a kernel is to join."""
        return self._replace(exact_tokens=self.exact_tokens.apart())

    @property
    def whole(self) -> "View":
        """The same, but all queries see as far back as the first."""
        if self.ring is None:
            return self
        return self._replace(ring=self.ring._replace(whole=True))

    def exact(self, first: int, last: int) -> tuple[mx.array, mx.array]:
        """Exact keys and values of the sinks and of the positions first, ..., last - 1."""
        if first == self.exact_start and last == self.end:
            return self.exact_tokens.keys, self.exact_tokens.values
        sinks, skip = self.sinks, self.sinks - self.exact_start
        keys, values = (
            mx.concatenate([x[:, :, :sinks], x[:, :, first + skip : last + skip]], axis=2)
            for x in (self.exact_tokens.keys, self.exact_tokens.values)
        )
        return keys, values

    def codes(self, first: int, last: int) -> tuple[Codes, Codes]:
        """Codes of keys and values of the positions first, ..., last - 1."""
        if (first, last) == (self.first_coded, self.coded):
            return self.key_codes, self.value_codes
        first, last = first - self.first_coded, last - self.first_coded
        return code_range(self.key_codes, self.value_codes, first, last)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All that the queries see, (B, H, T, D) in the model's dtype, codes dequantised."""
        oldest = self.oldest(0)[1]
        coded = max(oldest, min(self.coded, self.exact_from(self.end - 1)))
        exact = self.exact(coded, self.end)
        if coded == oldest:
            return exact
        key_codes, value_codes = self.codes(oldest, coded)
        decoded = (
            self.codec.decode_keys(key_codes, oldest),
            self.codec.decode_values(value_codes),
        )
        keys, values = (
            mx.concatenate(
                [x[:, :, : self.sinks], d.astype(x.dtype), x[:, :, self.sinks :]], axis=2
            )
            for x, d in zip(exact, decoded)
        )
        return keys, values


def code_range(key_codes: Codes, value_codes: Codes, first: int, last: int) -> tuple[Codes, Codes]:
    """The tokens first, ..., last - 1 of codes, in arrays of their own.

    Elementwise work on strided arrays is slow, copying packed codes is not.
    """
    return (
        tuple(_cut_last_axis(plane, first, last) for plane in key_codes),
        tuple(_cut_tokens(plane, first, last) for plane in value_codes),
    )


def _cut_last_axis(plane: mx.array, first: int, last: int) -> mx.array:
    # MLX copies words as fast as it copies bytes.
    if plane.dtype == mx.uint8 and not (first % 4 or last % 4 or plane.shape[-1] % 4):
        words = plane.view(mx.uint32)[..., first // 4 : last // 4]
        return mx.contiguous(words).view(mx.uint8)
    return mx.contiguous(plane[..., first:last])


def _cut_tokens(plane: mx.array, first: int, last: int) -> mx.array:
    if plane.dtype == mx.uint8 and plane.shape[-1] % 4 == 0:
        return mx.contiguous(plane.view(mx.uint32)[..., first:last, :]).view(mx.uint8)
    return mx.contiguous(plane[..., first:last, :])

"""What the attention of one forward pass reads from a cache."""

from dataclasses import dataclass

import mlx.core as mx

from ..codecs.kv_codec import Codes, KVCodec
from .visibility import Visibility


@dataclass(frozen=True)
class View:
    """One layer's keys and values as the queries of one forward pass find them.

    Attributes:
        keys, values: exact, (B, H, E, D): the sinks, then the positions
            ``exact_start``, ..., ``end`` - 1.
        key_codes, value_codes: of the positions 0, ..., ``coded`` - 1.
        start: position of the first query.
        end: one more than the position of the last query.
    """

    codec: KVCodec
    visibility: Visibility
    keys: mx.array
    values: mx.array
    key_codes: Codes
    value_codes: Codes
    coded: int
    start: int
    end: int

    @property
    def sinks(self) -> int:
        return min(self.visibility.sinks, self.end)

    @property
    def exact_start(self) -> int:
        """Position of the first exact token after the sinks."""
        return self.end - (self.keys.shape[2] - self.sinks)

    def exact(self, first: int, last: int):
        """Exact keys and values of the sinks and of the positions first, ..., last - 1."""
        if first == self.exact_start and last == self.end:
            return self.keys, self.values
        sinks, skip = self.sinks, self.sinks - self.exact_start
        return tuple(
            mx.concatenate([x[:, :, :sinks], x[:, :, first + skip : last + skip]], axis=2)
            for x in (self.keys, self.values)
        )

    def codes(self, first: int, last: int):
        """Codes of keys and values of the positions first, ..., last - 1."""
        if last - first == self.coded:
            return self.key_codes, self.value_codes
        # Elementwise work on strided arrays is slow, copying packed codes is not.
        return (
            tuple(mx.contiguous(codes[..., first:last]) for codes in self.key_codes),
            tuple(mx.contiguous(codes[..., first:last, :]) for codes in self.value_codes),
        )

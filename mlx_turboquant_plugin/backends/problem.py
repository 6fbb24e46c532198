"""What a backend is given to attend: a few queries, the full-precision tokens and the codes."""

from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from ..codecs.kv_codec import Codes, KVCodec

if TYPE_CHECKING:
    from ..cache.full_precision import FullPrecisionTokens


class Problem(NamedTuple):
    """Causal attention of a few queries over one layer.

    Attributes:
        codec: gives the rotations, the balance and the key bias.
        queries: (B, H_q, N, D), not scaled; N is at most :attr:`Backend.max_queries`.
        full_tokens: ``sinks`` sinks, then the newest tokens of each row, the very newest
            last. The last N are those of the queries.
        key_codes, value_codes: see :class:`KVCodec`; index i stands for the position
            ``first_quantized`` + i. Both are () if there are none.
        bounds: int32 (B, N, 4), what each query sees: the first sink; the index of the
            first code; how many of the last codes it does not read, because it reads
            their tokens exactly or not at all; how many of the last full-precision tokens it
            reads if not newer than itself. Counted like this they repeat: arrays of numbers
            are costly to make on some devices.
        scale: what scores are multiplied by.
        learned_sinks: (H_q,), scores of one more token without a value, not scaled; or None.
        shared: what backends have made of the positions for all layers, under keys of their own.
    """

    codec: KVCodec
    queries: mx.array
    full_tokens: "FullPrecisionTokens"
    sinks: int
    key_codes: Codes
    value_codes: Codes
    first_quantized: int
    bounds: mx.array
    scale: float
    learned_sinks: mx.array | None
    shared: dict[Any, Any]

"""The tokens of one layer that a backend puts side by side, and what it makes of them."""

from typing import NamedTuple

import mlx.core as mx

from ..codecs.kv_codec import Codes

Pair = tuple[mx.array, mx.array]


class Tokens(NamedTuple):
    """The tokens of one layer.

    Attributes:
        older: full-precision keys and values (B, H, E, D), or None.
        newer: those that come after them, (B, H, N, D), or None.
        key_codes, value_codes: see :class:`KVCodec`; the first stand for the position
            ``first_quantized``.
    """

    older: Pair | None
    newer: Pair | None
    key_codes: Codes
    value_codes: Codes
    first_quantized: int

    @property
    def some(self) -> Pair:
        """Full-precision keys and values that are there."""
        pair = self.older or self.newer
        assert pair is not None, "there are some tokens"
        return pair


class Places(NamedTuple):
    """Which tokens are put side by side, by their places among codes and among the others.

    Attributes:
        left: the zeros before.
        sinks: how many of the first full-precision tokens come first in all that is made.
        first_code, decoded: the first code that counts, and how many do.
        first_full, full: the same of the full-precision tokens after the sinks.
        total: T, with the zeros before and after.
        first_kept, kept: as for full-precision tokens, for those that are put together apart; at
            least one, since MLX has no empty outputs.
    """

    left: int
    sinks: int
    first_code: int
    decoded: int
    first_full: int
    full: int
    total: int
    first_kept: int = 0
    kept: int = 1


class Pass(NamedTuple):
    """What a pass makes.

    Attributes:
        laid_out: keys and values (B, H, T, D) that its queries read.
        kept: the full-precision tokens that stay, (B, H, E, D).
        key_codes, value_codes: all there are now.
    """

    laid_out: Pair
    kept: Pair
    key_codes: Codes
    value_codes: Codes


class Plan(NamedTuple):
    """What a pass is to do; equal for all layers.

    Attributes:
        places: of the tokens that its queries read, and of those that stay in full precision.
        start: the position of the first token that becomes a code.
        encoded: which tokens do, by their places among those that are laid out.
    """

    places: Places
    start: int
    encoded: range

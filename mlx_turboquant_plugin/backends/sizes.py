"""Sizes and numbers that launchers and device code share: each is written here or in the codecs.

Device code gets those of a class by their names, see :func:`constants`.
"""

import math

from ..codecs import feedback, key_bias, lloyd_max


class Scores:
    """Of attention, in both languages: scores are in powers of two."""

    LOG2_E = math.log2(math.e)


class Codes:
    """Of codes and of the tables of a key bias, in both languages."""

    # The levels that a codec can have.
    MOST_LEVELS = 2 ** max(lloyd_max.CODEBOOKS)
    OFFSET = lloyd_max.OFFSET
    STEPS_PER_OCTAVE, LOWEST_OCTAVE = lloyd_max.STEPS_PER_OCTAVE, lloyd_max.LOWEST_OCTAVE
    SEARCHED, ALONG = len(lloyd_max.SEARCH), lloyd_max.ALONG
    FEEDBACK_BLOCK = feedback.FEEDBACK_BLOCK
    # Positions that the fine table has, and the distance of those of the coarse ones.
    ANGLES = key_bias.BLOCK


class Encode:
    """Of encode.cu and encode.metal: the tokens of a block or threadgroup."""

    ENCODED = 32


class Split:
    """Of a block of split.cu."""

    WARPS = 4
    THREADS = 32 * WARPS
    # Tokens of a tile of codes, which a warp takes at a time.
    SHORT_TILE, LONG_TILE = 32, 64
    # Full-precision tokens of a split.
    FULL_SPLIT = 64


class Merge:
    """Of a block of merge.cu, which has room for so many splits."""

    MERGE_THREADS = 512
    MERGED_SPLITS = 1024


class BlockEncode(Encode):
    """Of a block of encode.cu, which has a warp for each token: of wide vectors fewer, or they
    would not fit into shared memory."""

    WIDE, WIDE_ENCODED = 256, Encode.ENCODED // 2

    @classmethod
    def tokens(cls, dim: int) -> int:
        """How many tokens a block has whose vectors have at most ``dim`` channels."""
        return cls.ENCODED if dim <= cls.WIDE else cls.WIDE_ENCODED


class Simdgroups:
    """Of a threadgroup of decode.metal, merge.metal and encode.metal."""

    SIMDS = 4
    THREADS = 32 * SIMDS


class Decode(Simdgroups):
    """Of decode.metal: tokens that a simdgroup takes at a time."""

    # Of codes, four for each lane; they must have the angles of one block.
    TILE = Codes.ANGLES
    FULL_TILE = 32


class GroupEncode(Simdgroups, Encode):
    """Of encode.metal."""


class Dequantize:
    """Of a threadgroup of dequantize.metal."""

    SIMDS = 8
    THREADS = 32 * SIMDS
    TOKENS = 64


# How each language declares a whole number: a constant is in CUDA's machine code, used or not.
METAL, CUDA = "constant constexpr int {} = {};", "enum : int {{ {} = {} }};"


def constants(*tables: type, integer: str) -> str:
    """What a source begins with to have the numbers of these classes.

    Args:
        integer: how a whole number is declared.
    """
    lines = []
    for table in tables:
        for name in filter(str.isupper, dir(table)):
            number = getattr(table, name)
            is_whole = isinstance(number, int)
            lines.append(
                integer.format(name, number) if is_whole else f"#define {name} {number!r}f"
            )
    return "\n".join([*lines, ""])

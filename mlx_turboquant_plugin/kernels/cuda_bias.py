"""What ``bias.cu`` needs to know of rotary positions."""

from typing import List, Tuple

import mlx.core as mx
import numpy as np

from ..codecs.key_bias import BLOCK, KeyBias, RotaryTable
from .inputs import int_array

# The inputs of a kernel that :func:`bias_arrays` gives.
BIAS = ("bias", "middles", "coarse_cos", "coarse_sin", "waves", "first_coded")


def bias_arrays(bias: KeyBias, first_coded: int, end: int, tile: int) -> List[mx.array]:
    """The bias, its rotary table and the waves of a tile.

    Args:
        first_coded: the position of the first code.
        end: one more than that of the last.
        tile: the tokens of a tile.
    """
    table = bias.table
    # The middle of the last tile may be past the end. The arrays double when they grow, so that
    # their shapes, and what is traced for these, are seldom new.
    table.reach((end + tile) // BLOCK + 1)
    middles, waves = _tables(table, tile)
    return [bias.bias, middles, *table.coarse, waves, int_array(first_coded)]


def _tables(table: RotaryTable, tile: int) -> Tuple[mx.array, mx.array]:
    made = table.derived
    if tile not in made:
        made[tile] = _middles(table), _waves(table, tile)
        mx.eval(made[tile])
    return made[tile]


def _turns(table: RotaryTable) -> Tuple[np.ndarray, np.ndarray]:
    """exp(i angle), complex, of each pair at the first positions, (F, BLOCK), and at 1/2, (F, 1)."""
    cos, sin = np.split(np.array(table.fine, np.float64), 2)
    turns = cos + 1j * sin
    return turns, np.exp(0.5j * np.angle(turns[:, 1:2]))


def _middles(table: RotaryTable) -> mx.array:
    """The table ``fine`` for positions less 1/2: of the middles of tiles, between two tokens."""
    turns, half = _turns(table)
    turns = turns / half
    return mx.array(np.concatenate([turns.real, turns.imag]).astype(np.float32))


def _waves(table: RotaryTable, tile: int) -> mx.array:
    """Cosines and sines of the pairs at the tokens of a tile, from its middle on.

    As the left factors of matrix products (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
    halves that add up to fp32, two in a word, uint32 (cosines or sines, steps of 16 pairs, 16
    tokens, larger or smaller half, lanes, 4). A lane (g, c) has pairs 4 c, ..., 4 c + 3 of a
    step and, of the tokens, the first half of the g-th eighth.
    """
    turns, half = _turns(table)
    after = turns[:, : tile // 2] * half
    waves = np.concatenate([after[:, ::-1].conj(), after], axis=1)
    # Pairs and tokens, both in parts: (steps, c, words, 2) and (g, 16 tokens, 2).
    waves = np.pad(waves, [(0, -len(waves) % 16), (0, 0)])
    waves = waves.reshape(-1, 4, 2, 2, 8, tile // 8)[..., : tile // 16]
    waves = waves.reshape(*waves.shape[:5], tile // 32, 2)
    waves = np.stack([waves.real, waves.imag])
    large = waves.astype(np.float16)
    parts = np.stack([large, (waves - large).astype(np.float16)])
    part, wave, step, c, word, pair, g, tokens, token = range(9)
    order = wave, step, tokens, part, g, c, word, token, pair
    words = np.ascontiguousarray(parts.transpose(order)).view(np.uint32)
    return mx.array(words.reshape(2, -1, tile // 32, 2, 32, 4))

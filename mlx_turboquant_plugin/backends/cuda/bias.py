"""What ``bias.cu`` needs to know of rotary positions."""

import mlx.core as mx
import numpy as np

from ...codecs.key_bias import BLOCK, RotaryTable
from ..sizes import Split
from .layer import side_by_side

# The tokens of a tile.
TILES = Split.SHORT_TILE, Split.LONG_TILE


def rotary_array(table: RotaryTable, end: int) -> mx.array:
    """The waves of tiles, the angles of their middles and those of blocks: see bias.cu.

    Args:
        end: one more than the last position that is needed.
    """
    # The middle of the last tile may be past the end. Blocks double when they grow, so that the
    # shape, and what is traced for it, is seldom new.
    table.reach((end + max(TILES)) // BLOCK + 1)
    # Before anything else is read: what another thread's growth outdates must not get into its own.
    derived = table.derived
    if "cuda" not in derived:
        waves = (_waves(table, tile) for tile in TILES)
        derived["cuda"] = (side_by_side(*waves, _middles(table), *table.coarse),)
    return derived["cuda"][0]


def _turns(table: RotaryTable) -> tuple[np.ndarray, np.ndarray]:
    """exp(i angle), complex, of each pair at the first positions (F, BLOCK), at 1/2 (F, 1)."""
    cos, sin = np.split(np.array(table.fine, np.float64), 2)
    turns = cos + 1j * sin
    return turns, np.exp(0.5j * np.angle(turns[:, 1:2]))


def _middles(table: RotaryTable) -> np.ndarray:
    """The table ``fine`` for positions less 1/2: of the middles of tiles, between two tokens."""
    turns, half = _turns(table)
    turns = turns / half
    return np.concatenate([turns.real, turns.imag]).astype(np.float32)


def _waves(table: RotaryTable, tile: int) -> np.ndarray:
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
    return np.ascontiguousarray(parts.transpose(order)).view(np.uint32)

"""The rotated key bias follows the model's own rope object."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlx_turboquant_plugin import reference
from mlx_turboquant_plugin.codecs.key_bias import KeyBias

DIM = 64
HEADS = 2
# The beginning, both sides of a block of angles and of the next, and far beyond.
POSITIONS = (0, 1, 127, 128, 129, 5000)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
MAGNIFYING_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 512,
    "short_factor": [1.0] * (DIM // 2),
    "long_factor": np.linspace(1, 30, DIM // 2).tolist(),
}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
MROPE = {"rope_type": "mrope", "mrope_section": [8, 12, 12]}


def rope(dims=DIM, traditional=False, scaling=None):
    return initialize_rope(dims, 10000.0, traditional, scaling, max_position_embeddings=4096)


ROPES = {
    "default": rope(),
    "traditional": rope(traditional=True),
    "partial": rope(dims=32),
    "partial-traditional": rope(dims=16, traditional=True),
    "linear": rope(scaling={"type": "linear", "factor": 4.0}),
    "llama3": rope(scaling=LLAMA3),
    "llama3-traditional-partial": rope(dims=32, traditional=True, scaling=LLAMA3),
    "yarn": rope(scaling=YARN),
    "yarn-partial": rope(dims=32, scaling=MAGNIFYING_YARN),
    "longrope": rope(scaling=LONGROPE),
    "proportional": rope(scaling=PROPORTIONAL),
    "mrope": rope(scaling=MROPE),
    "none": None,
}
every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def bias(scale=30.0):
    rng = np.random.default_rng(0)
    return mx.array(rng.standard_normal((HEADS, DIM)).astype(np.float32) * scale)


def turned(rope, b, start, count):
    """The rope object's own answer: (H, count, D)."""
    b = mx.broadcast_to(b[None, :, None], (1, HEADS, count, DIM))
    return np.array(b if rope is None else rope(b, offset=start))[0]


@every_rope
@pytest.mark.parametrize("start", POSITIONS)
@pytest.mark.parametrize("count", [1, 130])
def test_rotated_is_what_the_rope_object_makes_of_the_bias(rope, start, count):
    b = bias()
    ours = KeyBias(b, rope).rotated(start, count)
    # An angle of 5000 has 3e-4 of rounding in fp32.
    np.testing.assert_allclose(ours, turned(rope, b, start, count), atol=30 * 5e-3)
    assert ours.shape == (HEADS, count, DIM)


@every_rope
@pytest.mark.parametrize("start", POSITIONS)
@pytest.mark.parametrize("count", [1, 130])
def test_scores_are_products_with_the_rotated_bias(rope, start, count):
    b = bias()
    q = np.random.default_rng(1).standard_normal((3, HEADS, 5, DIM)).astype(np.float32)
    key_bias = KeyBias(b, rope)
    scores = key_bias.scores(key_bias.coefficients(mx.array(q)), start, count)
    expected = q @ turned(rope, b, start, count).swapaxes(-1, -2)
    assert scores.shape == expected.shape
    error = np.abs(scores - expected).max()
    assert error < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [DIM, 32])
def test_rotated_is_the_oracles(traditional, dims):
    b = bias()
    positions = np.array(range(250, 400))
    ours = KeyBias(b, rope(dims, traditional)).rotated(250, 150)
    wide = np.array(b)[:, None].repeat(150, axis=1)
    expected = reference.rope(wide, positions, traditional=traditional, dims=dims)
    np.testing.assert_allclose(ours, expected, atol=30 * 2e-4)


@pytest.mark.parametrize("scaling", [MAGNIFYING_YARN, LONGROPE], ids=["yarn", "longrope"])
def test_magnitudes_of_the_rope_object_are_kept(scaling):
    b = bias()
    rotated = np.array(KeyBias(b, rope(scaling=scaling)).rotated(1000, 3))
    length = np.linalg.norm(rotated, axis=-1) / np.linalg.norm(np.array(b), axis=-1)[:, None]
    assert (length > 1.1).all()
    np.testing.assert_allclose(length, length[0, 0], rtol=1e-4)


def test_more_positions_than_ever_before_make_the_tables_longer_and_change_nothing():
    b = bias()
    key_bias = KeyBias(b, rope())
    before = np.array(key_bias.rotated(100, 300))
    key_bias.rotated(50_000, 10)
    np.testing.assert_array_equal(before, key_bias.rotated(100, 300))


def test_half_precision_bias_is_used_in_fp32():
    b = bias().astype(mx.bfloat16)
    key_bias = KeyBias(b, rope())
    expected = turned(rope(), b.astype(mx.float32), 129, 2)
    np.testing.assert_allclose(key_bias.rotated(129, 2), expected, atol=30 * 2e-4)


class BaseDependsOnLength(nn.RoPE):
    """As dynamic NTK scaling, for a cache's whole length."""

    def __call__(self, x, offset=0):
        length = mx.max(mx.array(offset)).item() + x.shape[2]
        return mx.fast.rope(
            x, self.dims, traditional=False, base=1e4 * (1 + length), scale=1.0, offset=offset
        )


class MixesPairs(nn.RoPE):
    """Its halves are other than its attribute says."""

    def __call__(self, x, offset=0):
        return mx.fast.rope(x, self.dims, traditional=True, base=1e4, scale=1.0, offset=offset)


class TakesPositions:
    """Takes the positions of every token, as multimodal models' do."""

    def __call__(self, x, position_ids):
        return x


class AddsToItsInput:
    def __call__(self, x, offset=0):
        return x + 1


@pytest.mark.parametrize(
    "rope",
    [
        rope(scaling={"type": "dynamic", "factor": 2.0}),
        BaseDependsOnLength(DIM),
        MixesPairs(DIM),
        TakesPositions(),
        AddsToItsInput(),
    ],
    ids=lambda rope: type(rope).__name__,
)
def test_a_rope_object_that_is_no_rotation_by_position_is_refused(rope):
    with pytest.raises(ValueError, match=f"can't be separated .* {type(rope).__name__}"):
        KeyBias(bias(), rope)


def test_ropes_of_one_kind_that_turn_alike_are_looked_at_once():
    far = []

    class Rope(nn.RoPE):
        def __call__(self, x, offset=0):
            far.append(offset if isinstance(offset, int) else 0)
            return super().__call__(x, offset=offset)

    first = KeyBias(mx.ones((2, 64)), Rope(64))
    assert max(far) > 10_000
    far.clear()
    assert KeyBias(mx.ones((2, 64)), Rope(64)).table is first.table and max(far) == 0
    # Which turns in another way.
    KeyBias(mx.ones((2, 64)), Rope(64, base=500))
    assert max(far) > 10_000


def test_a_bias_of_nothing_says_nothing_about_a_rope():
    class Rope(nn.RoPE):
        def __call__(self, x, offset=0):
            turned = super().__call__(x, offset=offset)
            return turned * (1 + 0.5 * (offset > 10_000)) if isinstance(offset, int) else turned

    silent = KeyBias(mx.zeros((2, 64)), Rope(64))
    with pytest.raises(ValueError, match="can't be separated"):
        KeyBias(mx.ones((2, 64)), Rope(64))
    assert Rope not in silent.table.agreeing

"""Rotations, packing, quantizers and the codec made of them, against the oracle."""

import mlx.core as mx
import numpy as np
import pytest
from lloyd_max import curve_levels, distortion, levels

from mlx_turboquant_plugin import reference
from mlx_turboquant_plugin.codecs import kv_codec, lloyd_max, packing, rotation
from mlx_turboquant_plugin.codecs.affine import GroupAffine, VectorAffine
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.codecs.lloyd_max import CODEBOOKS, OFFSET, SEARCH, LloydMax
from mlx_turboquant_plugin.codecs.rotation import Rotation
from mlx_turboquant_plugin.codecs.segmented import Segmented
from mlx_turboquant_plugin.rules import CODEC_BITS

DIMS = (64, 80, 96, 112, 128, 256)
LLOYD_MAX_BITS = CODEC_BITS["lloyd-max"]
AFFINE_BITS = CODEC_BITS["affine"]
SPECS = [
    *({"key_codec": "lloyd-max", "key_bits": b, "value_bits": b} for b in LLOYD_MAX_BITS),
    *(
        {"key_codec": "affine", "key_bits": b, "value_codec": "affine", "value_bits": b}
        for b in AFFINE_BITS
    ),
]
every_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec['key_codec']}-{spec['key_bits']}"
)

# The distortions that Max (1960) found for 4, 8 and 16 levels.
LEAST = {2: 0.1175, 3: 0.03454, 4: 0.009497}

every_dim = pytest.mark.parametrize("dim", DIMS)
every_lloyd_max = pytest.mark.parametrize("bits", LLOYD_MAX_BITS)
every_affine = pytest.mark.parametrize("bits", AFFINE_BITS)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codes_and_sizes(encoded, bits):
    *packed, sizes = encoded
    return np.array(packing.unpack(packed, bits)), np.array(sizes)


def equal_part(ours, theirs):
    """The part of all numbers in two tuples of arrays that are equal."""
    same = [np.array(a) == np.array(b) for a, b in zip(ours, theirs, strict=True)]
    return np.concatenate([x.ravel() for x in same]).mean()


def relative_error(approximate, exact):
    approximate, exact = (np.asarray(x, np.float64) for x in (approximate, exact))
    return np.sum((approximate - exact) ** 2) / np.sum(exact**2)


# Packing


@every_dim
@pytest.mark.parametrize("tokens", [5, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_undoes_pack_and_no_bit_is_lost_to_padding(bits, tokens, dim):
    shape = 2, tokens, dim
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint8)
    packed = packing.pack(mx.array(codes), bits)
    assert all(plane.dtype == mx.uint8 for plane in packed)
    assert sum(plane.nbytes for plane in packed) == codes.size * bits // 8
    assert np.array_equal(packing.unpack(packed, bits), codes)
    swapped = [mx.swapaxes(plane, -1, -2) for plane in packed]
    assert np.array_equal(packing.unpack(swapped, bits, axis=-2), codes.swapaxes(-1, -2))


# Rotation


@every_dim
def test_rotation_is_the_oracles_and_orthogonal(dim):
    matrix = reference.rotation(dim)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-12)
    array = Rotation(dim).array
    x = gaussian(7, dim)
    turned = Rotation.forward(mx.array(x), array)
    np.testing.assert_allclose(turned, x @ matrix, atol=1e-5)
    np.testing.assert_allclose(Rotation.inverse(turned, array), x, atol=1e-5)
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, atol=1e-3)


@every_dim
def test_rotation_spreads_one_channel_over_all(dim):
    turned = np.abs(Rotation.forward(mx.eye(dim), Rotation(dim).array))
    # A matrix has the square roots of 2 of the cosines in it.
    assert turned.max() <= 1.4143 / np.sqrt(dim & -dim)


def test_rotation_depends_on_dim_and_seed_alone():
    rotations = [Rotation(dim, seed) for dim in DIMS for seed in (1, 2)]
    first = [bytes(r.array) for r in rotations]
    rotation._rotation_array.cache_clear()
    assert [bytes(r.array) for r in reversed(rotations)] == first[::-1]
    assert len(set(first)) == len(first)


def test_rotation_is_still_the_one_of_saved_caches():
    assert KVCodec(CodecSpec(head_dim=128, value_dim=80)).checksum == 4012789649


# Codebooks


@every_lloyd_max
def test_levels_are_nearly_the_best(bits):
    book = CODEBOOKS[bits]
    assert distortion(levels(bits)) == pytest.approx(LEAST[bits], rel=1e-3)
    assert distortion(np.array(book.levels) / book.unit) < 1.002 * LEAST[bits]


@every_lloyd_max
def test_curve_table_and_oracle_have_the_same_levels(bits):
    book = CODEBOOKS[bits]
    curve = np.array(lloyd_max.level_bytes(mx.arange(2**bits).astype(mx.uint8), bits)) - OFFSET
    half = np.array(book.levels)
    np.testing.assert_array_equal(curve, [*-half[::-1], *half])
    np.testing.assert_array_equal(curve_levels(bits, *book.curve), half)
    np.testing.assert_allclose(curve / book.unit, reference.LEVELS[bits], rtol=1e-12)


@every_lloyd_max
def test_thresholds_lie_midway_between_levels(bits):
    middle = (reference.LEVELS[bits][1:] + reference.LEVELS[bits][:-1]) / 2
    for shift, expected in ((-1e-4, np.arange(2**bits - 1)), (1e-4, np.arange(1, 2**bits))):
        z = mx.array((middle + shift).astype(np.float32))
        np.testing.assert_array_equal(lloyd_max._nearest(z, bits), expected)


# Lloyd-Max


def various(dim):
    """Vectors of many lengths: 100 of N(0, 1) times 1e-3 to 100."""
    return gaussian(100, dim, seed=dim) * np.geomspace(1e-3, 100, 100, dtype=np.float32)[:, None]


def check_against_oracle(x, bits):
    encoded = LloydMax(bits).encode(mx.array(x))
    codes, sizes = codes_and_sizes(encoded, bits)
    oracle_codes, oracle_sizes = reference.quantize(x, bits)
    # Rounding may move a number over a threshold or decide between two equal sizes.
    same = (sizes == oracle_sizes)[:, 0]
    assert same.mean() >= 0.99
    assert np.mean(codes[same] == oracle_codes[same]) > 0.999
    decoded = LloydMax(bits).decode(encoded)
    np.testing.assert_allclose(
        decoded, reference.dequantize(codes.astype(int), sizes.astype(int), bits), rtol=1e-5
    )
    oracle = reference.dequantize(oracle_codes, oracle_sizes, bits)
    assert relative_error(decoded, x) == pytest.approx(relative_error(oracle, x), rel=1e-3)


@every_dim
@every_lloyd_max
def test_lloyd_max_is_the_oracles(bits, dim):
    check_against_oracle(various(dim), bits)


@every_lloyd_max
def test_head_dims_do_not_mix_within_a_process(bits):
    for dims in ((64, 128), (128, 64)):
        for dim in dims:
            check_against_oracle(various(dim), bits)


@every_dim
@every_lloyd_max
def test_gaussian_error_is_as_expected(bits, dim):
    x = gaussian(1000, dim)
    quantizer = LloydMax(bits)
    decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x))))
    # A size fitted to each short vector does better than one for all.
    assert 0.8 < relative_error(decoded, x) / LEAST[bits] < 1.02


@every_lloyd_max
def test_the_search_for_the_size_keeps_more_of_the_length_along_the_vector(bits):
    x = gaussian(500, 128)
    quantizer = LloydMax(bits)
    decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x))))
    along = np.sum(decoded * x, axis=-1) / np.sum(x * x, axis=-1)
    # The least error alone shortens by just that error (Max 1960).
    assert 0.6 < (1 - along.mean()) / LEAST[bits] < 0.8


@pytest.mark.parametrize("codec", [LloydMax(4), Segmented(), Segmented(mx.array([4, 5, 6]))])
def test_scales_tried_at_once_or_one_by_one_make_the_same_codes(codec, monkeypatch):
    x = mx.array(various(64)[:99]).reshape(1, 3, 33, 64)
    monkeypatch.setattr(lloyd_max, "AT_ONCE", len(SEARCH) * x.size)
    at_once = codec.encode(x)
    monkeypatch.setattr(lloyd_max, "AT_ONCE", len(SEARCH) * x.size - 1)
    for one, other in zip(at_once, codec.encode(x)):
        np.testing.assert_array_equal(one, other)


@every_dim
@every_lloyd_max
def test_zero_vectors_stay_next_to_zero(bits, dim):
    quantizer = LloydMax(bits)
    decoded = quantizer.decode(quantizer.encode(mx.zeros((3, dim))))
    assert np.abs(decoded).max() < 1e-4


@every_lloyd_max
@pytest.mark.parametrize("magnitude", [2e-4, 1e-2, 1, 50, 250])
def test_error_does_not_depend_on_the_magnitude(bits, magnitude):
    x = gaussian(200, 128)
    quantizer = LloydMax(bits)
    decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x * magnitude)))) / magnitude
    assert relative_error(decoded, x) < 1.06 * LEAST[bits]


@every_lloyd_max
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e-4, 300, 1e4])
def test_magnitudes_out_of_range_stay_finite_and_the_right_way(bits, magnitude):
    x = gaussian(50, 64) * np.float32(magnitude)
    quantizer = LloydMax(bits)
    decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x))))
    assert np.isfinite(decoded).all()
    assert (decoded * x >= 0).all()


@every_dim
@every_lloyd_max
def test_constant_vectors_are_spread_before_they_are_quantized(bits, dim):
    values = mx.broadcast_to(mx.array([0.01, 1.0, 40.0])[:, None], (3, dim))[None, None]
    codec = KVCodec(CodecSpec(dim, dim, value_bits=bits))
    decoded = codec.decode_values(codec.encode_values(values))
    # Few of their rotated coordinates differ, so they can be far from Gaussian.
    assert relative_error(decoded, values) < 3 * LEAST[bits]


# Affine


@every_dim
@every_affine
def test_vector_affine_is_half_a_step_off_at_most(bits, dim):
    x = gaussian(100, dim) * 5 + 2
    quantizer = VectorAffine(bits)
    encoded = quantizer.encode(mx.array(x))
    scale = np.array(encoded[-2]).astype(np.float32)
    assert (np.abs(quantizer.decode(encoded) - x) <= 0.501 * scale).all()
    span = x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)
    np.testing.assert_allclose(scale, span / (2**bits - 1), rtol=2e-3)
    assert sum(plane.nbytes for plane in encoded) == 100 * (dim * bits // 8 + 4)


@every_dim
@every_affine
def test_group_affine_is_a_step_off_at_most(bits, dim):
    x = gaussian(100, dim) * 5 + 2
    quantizer = GroupAffine(bits, dim)
    encoded = quantizer.encode(mx.array(x))
    decoded = quantizer.decode(encoded)
    assert decoded.shape == x.shape
    # Half a step, but mx.quantize moves the steps to have zero among them; and at
    # 8 bits a step is so small that its rounding to fp16 counts.
    scale = np.abs(encoded[1]).astype(np.float32).repeat(quantizer.group_size, axis=-1)
    assert (np.abs(decoded - x) <= 1.1 * scale[:, :dim]).all()
    groups = -(-dim // quantizer.group_size)
    stored = groups * (quantizer.group_size * bits // 8 + 4)
    assert sum(plane.nbytes for plane in encoded) == 100 * stored


@pytest.mark.parametrize("value", [0.0, 1.0, -40.0])
@pytest.mark.parametrize("quantizer", [VectorAffine(4), GroupAffine(4, 80), GroupAffine(2, 64)])
def test_affine_keeps_constant_vectors(quantizer, value):
    x = mx.full((3, getattr(quantizer, "head_dim", 64)), value)
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(x)), x, rtol=1e-3)


# Products with codes


@every_dim
@pytest.mark.parametrize("tokens", [33, 64])
@pytest.mark.parametrize("quantizer", [*map(LloydMax, (2, 3, 4)), *map(VectorAffine, (3, 8))])
def test_scores_are_products_with_the_decoded_keys(quantizer, tokens, dim):
    keys, q = gaussian(2, tokens, dim), gaussian(2, 5, dim, seed=1)
    encoded = quantizer.encode(mx.array(keys))
    channel_major = tuple(mx.swapaxes(plane, -1, -2) for plane in encoded)
    scores = quantizer.scores(mx.array(q), *quantizer.expand(channel_major, -2))
    expected = q @ np.array(quantizer.decode(encoded)).swapaxes(-1, -2)
    np.testing.assert_allclose(scores, expected, atol=2e-3)


@every_dim
@every_spec
def test_mix_is_the_weighted_sum_of_the_decoded_values(spec, dim):
    quantizer = KVCodec(CodecSpec(dim, dim, **spec)).values
    values, p = gaussian(2, 33, dim), gaussian(2, 5, 33, seed=1)
    encoded = quantizer.encode(mx.array(values))
    mixed = quantizer.mix(mx.array(p), *quantizer.expand(encoded, -1))
    np.testing.assert_allclose(mixed, p @ np.array(quantizer.decode(encoded)), atol=2e-3)


# The codec


def kv_codec_with_bias(dim, heads=2, **spec):
    """A codec with a bias much larger than keys of N(0, 1), and uneven balance."""
    rng = np.random.default_rng(dim)
    bias = mx.array(rng.standard_normal((heads, dim)).astype(np.float32) * 30)
    balance = mx.array(rng.uniform(0.25, 4, (heads, 1, dim)).astype(np.float32))
    return KVCodec(CodecSpec(dim, dim, **spec), balance, KeyBias(bias, mx_rope))


def mx_rope(x, offset):
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=10000.0, scale=1.0, offset=offset)


def keys_with_bias(codec, tokens, start):
    """Keys whose part without the bias, divided by the balance, is N(0, 1)."""
    heads, _, dim = codec.balance.shape
    residual = gaussian(1, heads, tokens, dim) * np.array(codec.balance)
    bias = np.array(codec.bias.bias)[:, None].repeat(tokens, axis=1)
    return residual + reference.rope(bias, np.arange(start, start + tokens))


# The affine quantizer spreads its levels to the extremes, so it loses more.
MOST = {"lloyd-max": LEAST, "affine": {2: 0.9, 3: 0.15, 4: 0.03, 8: 1e-4}}


@every_dim
@every_spec
def test_decoded_keys_and_values_are_close_whatever_bias_and_balance(spec, dim):
    codec = kv_codec_with_bias(dim, **spec)
    keys = keys_with_bias(codec, 70, start=300)
    decoded = codec.decode_keys(codec.encode_keys(mx.array(keys), 300), 300)
    most = 1.06 * MOST[spec["key_codec"]][spec["key_bits"]]
    # What is quantized has unit mean square; the bias is a thousand times its energy.
    assert np.mean(np.square((decoded - keys) / codec.balance)) < most
    values = gaussian(1, 2, 70, dim, seed=1) + 1
    decoded = codec.decode_values(codec.encode_values(mx.array(values)))
    assert relative_error(decoded, values) < most


@pytest.mark.parametrize("dim", [64, 112])
def test_codec_is_the_oracles(dim):
    codec = kv_codec_with_bias(dim, key_bits=4)
    keys = keys_with_bias(codec, 50, start=130)
    bias = np.array(codec.bias.bias)[:, None].repeat(50, axis=1)
    bias = reference.rope(bias, np.arange(130, 180))
    balance = np.array(codec.balance)
    encoded = codec.encode_keys(mx.array(keys), 130)
    planes = [mx.swapaxes(plane, -1, -2) for plane in encoded]
    codes, sizes = codes_and_sizes(planes, 4)
    oracle_codes, oracle_sizes = reference.encode_keys(keys, 4, bias, balance)
    # The angles are fp32 and so is the bias, of 30 where keys are about 1.
    assert np.mean(sizes == oracle_sizes) > 0.97
    assert np.mean(codes == oracle_codes) > 0.97
    np.testing.assert_allclose(
        codec.decode_keys(encoded, 130),
        reference.decode_keys(codes.astype(int), sizes.astype(int), 4, bias, balance),
        atol=0.01,
    )


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@every_dim
def test_half_precision_is_encoded_as_the_same_numbers_in_fp32(dim, dtype):
    codec = kv_codec_with_bias(dim)
    keys = mx.array(keys_with_bias(codec, 40, start=5)).astype(dtype)
    assert (
        equal_part(codec.encode_keys(keys, 5), codec.encode_keys(keys.astype(mx.float32), 5)) == 1
    )
    assert equal_part(codec.encode_values(keys), codec.encode_values(keys.astype(mx.float32))) == 1
    assert codec.decode_values(codec.encode_values(keys)).dtype == mx.float32


@pytest.mark.parametrize("dim", [64, 80])
@every_spec
def test_encoding_in_steps_is_encoding_at_once(spec, dim, monkeypatch):
    codec = kv_codec_with_bias(dim, **spec)
    keys = mx.array(keys_with_bias(codec, 100, start=77))
    encoded = []
    for numbers in (1, 10**9):
        monkeypatch.setattr(kv_codec, "STEP", {mx.cpu: numbers, mx.gpu: numbers})
        encoded.append((*codec.encode_keys(keys, 77), *codec.encode_values(keys)))
    assert all(a.shape == b.shape for a, b in zip(*encoded, strict=True))
    # The order of sums in a matrix product may depend on the number of rows.
    assert equal_part(*encoded) > 0.995


@pytest.mark.parametrize("dim", [64, 80, 128])
@every_spec
def test_codes_of_a_token_do_not_depend_on_other_tokens(spec, dim):
    codec = kv_codec_with_bias(dim, **spec)
    keys = mx.array(keys_with_bias(codec, 40, start=120))
    together = codec.encode_keys(keys, 120)
    for start, stop in ((0, 1), (7, 8), (5, 38)):
        alone = codec.encode_keys(keys[:, :, start:stop], 120 + start)
        assert equal_part(alone, [plane[..., start:stop] for plane in together]) > 0.99
        alone = codec.encode_values(keys[:, :, start:stop])
        expected = [plane[..., start:stop, :] for plane in codec.encode_values(keys)]
        assert equal_part(alone, expected) > 0.99


def test_layers_of_different_head_dims_share_a_process():
    for dim in (64, 128, 80, 64):
        codec = kv_codec_with_bias(dim, value_bits=4)
        values = gaussian(1, 2, 40, dim)
        decoded = codec.decode_values(codec.encode_values(mx.array(values)))
        assert relative_error(decoded, values) < 1.05 * LEAST[4]

"""Keys in two segments, against the oracle, and for what they are there."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from layouts import layout

from mlx_turboquant_plugin import reference
from mlx_turboquant_plugin.attention.function import attention_functions
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.codecs.segmented import ERRORS, FIRST_BITS
from mlx_turboquant_plugin.integration.balance import layout as layout_of
from mlx_turboquant_plugin.tools import stored

HEADS, TOKENS, START = 3, 60, 130
every_dim = pytest.mark.parametrize("dim", [32, 64, 80, 128])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codec(dim, plain=False, fed_back=True):
    spec = CodecSpec(dim, dim, "segmented", 4)
    if plain:
        return KVCodec(spec)
    balance = np.exp(0.5 * normal(HEADS, 1, dim, seed=2))
    bias = KeyBias(mx.array(20 * normal(HEADS, dim, seed=3)), nn.RoPE(dim))
    squares = mx.array(np.exp(normal(HEADS, dim, seed=9))) if fed_back else None
    return KVCodec(spec, mx.array(balance), bias, layout(HEADS, dim), squares)


def keys_of(one):
    """Keys (1, HEADS, TOKENS, D) that are normal once their bias and balance are taken away."""
    dim = one.spec.head_dim
    x = normal(1, HEADS, TOKENS, dim, seed=4)
    if one.bias is None:
        return x, 0.0, 1.0, np.array([[*range(dim), 5]] * HEADS)
    bias = np.array(one.bias.bias)[:, None].repeat(TOKENS, axis=1)
    bias = reference.rope(bias, np.arange(START, START + TOKENS))
    balance = np.array(one.balance)
    return (x * balance + bias).astype(np.float32), bias, balance, np.array(one.layout)


@pytest.mark.parametrize("plain", [False, True])
@every_dim
def test_it_is_the_oracles(dim, plain):
    one = codec(dim, plain)
    keys, bias, balance, cut = keys_of(one)
    order, first_bits = cut[:, :-1], cut[:, -1]
    encoded = one.encode_keys(mx.array(keys), START)
    assert [x.shape for x in encoded] == [(1, HEADS, dim // 2, TOKENS), (1, HEADS, 2, TOKENS)]
    assert all(x.dtype == mx.uint8 for x in encoded)
    segments = stored.segments([np.array(x).swapaxes(-1, -2) for x in encoded], first_bits)
    fed_back = None
    if not plain:
        weights = np.array(one.query_squares) * balance[:, 0] ** 2
        weights = np.take_along_axis(weights, order, axis=-1).reshape(HEADS, 2, -1)
        fed_back = np.array([[reference.feedback(half) for half in head] for head in weights])
        np.testing.assert_allclose(one.feedback, fed_back, atol=2**-11)
        fed_back = np.array(one.feedback, np.float64)
    oracle = reference.encode_segments(keys, order, first_bits, bias, balance, fed_back)
    # Rounding may move a number over a threshold or decide between two equal sizes.
    for (codes, sizes), (oracle_codes, oracle_sizes) in zip(segments, oracle):
        same = (sizes == oracle_sizes)[..., 0]
        assert same.mean() > 0.97
        assert np.mean(codes[same] == oracle_codes[same]) > 0.995
    np.testing.assert_allclose(
        one.decode_keys(encoded, START),
        reference.decode_segments(segments, order, first_bits, bias, balance),
        atol=1e-3,
    )


@every_dim
def test_segments_lose_what_their_bits_do(dim):
    one = codec(dim, fed_back=False)
    keys, _, balance, _ = keys_of(one)
    decoded = one.decode_keys(one.encode_keys(mx.array(keys), START), START)
    lost = one.sorted((decoded - keys) / balance)
    first, second = (
        np.mean(np.square(part), axis=(0, 2, 3)) for part in np.split(lost, 2, axis=-1)
    )
    # A size for each short vector does better than one for all.
    for h, bits in enumerate(FIRST_BITS):
        assert 0.55 * ERRORS[bits] < first[h] < 1.05 * ERRORS[bits]
        assert 0.55 * ERRORS[8 - bits] < second[h] < 1.05 * ERRORS[8 - bits]


@every_dim
def test_feedback_moves_errors_to_where_queries_are_small(dim):
    lost = []
    for fed_back in (False, True):
        one = codec(dim, fed_back=fed_back)
        keys = keys_of(one)[0]
        error = one.decode_keys(one.encode_keys(mx.array(keys), START), START) - keys
        queries = normal(1, HEADS, 500, dim, seed=10) * np.sqrt(codec(dim).query_squares)[:, None]
        lost.append(np.mean(np.square(queries @ np.array(error).swapaxes(-1, -2))))
    assert lost[1] < 0.88 * lost[0]


@pytest.mark.parametrize("compiled", [False, True])
@every_dim
def test_scores_are_products_with_the_decoded_keys(dim, compiled):
    one = codec(dim)
    keys = keys_of(one)[0]
    encoded = one.encode_keys(mx.array(keys), START)
    q = mx.array(normal(1, HEADS, 5, dim, seed=5))
    functions = attention_functions(one.spec, compiled)
    rotated = functions.rotate(one.sorted(q * one.balance), one.key_rotation.array)
    scores = one.keys.scores(rotated, *one.keys.expand(encoded, -2))
    bias = one.bias.rotated(START, TOKENS)
    expected = q @ (one.decode_keys(encoded, START) - bias).swapaxes(-1, -2)
    np.testing.assert_allclose(scores, expected, atol=1e-4 * mx.abs(expected).max().item())


def test_channels_that_matter_more_get_the_bits():
    """Where the channels of queries differ widely, scores lose less than by 4 equal bits."""
    dim, spread = 64, np.exp(0.7 * normal(HEADS, 64, seed=6))
    keys = mx.array(normal(1, HEADS, 200, dim, seed=7) * spread[:, None])
    queries = mx.array(normal(1, HEADS, 200, dim, seed=8) * spread[:, None])
    cut = layout_of(mx.array(spread), mx.array(spread), None)
    lost = []
    for one in (
        KVCodec(CodecSpec(dim, dim, "lloyd-max", 4)),
        KVCodec(CodecSpec(dim, dim, "segmented", 4), None, None, cut),
    ):
        decoded = one.decode_keys(one.encode_keys(keys, 0), 0)
        difference = queries @ (decoded - keys).swapaxes(-1, -2)
        lost.append(mx.mean(difference**2).item())
    assert lost[1] < lost[0] / 1.4


def test_a_codec_can_be_made_of_arrays_that_have_no_values_yet():
    """A pass over a prompt on a GPU is traced with codecs of its inputs."""

    def traced(cut):
        return KVCodec(CodecSpec(64, 64, "segmented", 4), layout=cut).layout + 0

    cut = layout(HEADS, 64)
    assert mx.array_equal(mx.compile(traced)(cut), cut)

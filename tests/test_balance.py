"""The factors that weigh a key's channels, and that they change nothing but the weighing."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import cohere, gemma3_text, llama, qwen2, qwen3
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.integration.balance import balance, norm_rms, projection_rms
from mlx_turboquant_plugin.integration.family import register
from mlx_turboquant_plugin.integration.layer import known_layer
from mlx_turboquant_plugin.integration.projections import Projection, base_linear
from mlx_turboquant_plugin.integration.table import FAMILIES

DIM, HEADS, QUERY_HEADS = 64, 2, 4
HIDDEN = DIM * QUERY_HEADS
COMMON = dict(
    hidden_size=HIDDEN,
    num_hidden_layers=1,
    intermediate_size=64,
    num_attention_heads=QUERY_HEADS,
    num_key_value_heads=HEADS,
    rms_norm_eps=1e-5,
    vocab_size=64,
    rope_theta=10000.0,
    head_dim=DIM,
)
LAYOUTS = {
    "default": (DIM, False),
    "traditional": (DIM, True),
    "partial": (32, False),
    "partial-traditional": (32, True),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def rope(dims, traditional):
    return initialize_rope(dims, 10000.0, traditional)


def pairs(dims, traditional):
    """The two channels of each rotary pair: (dims / 2, 2)."""
    channels = np.arange(dims)
    return channels.reshape(-1, 2) if traditional else channels.reshape(2, -1).T


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def uneven(heads, seed):
    return mx.exp(normal(heads, DIM, seed=seed))


def attention(module=llama, **more):
    """An attention layer of uneven weights, and its norm."""
    names = {**COMMON, **more, "model_type": module.__name__.rsplit(".", 1)[-1]}
    if module is qwen2:
        del names["head_dim"]
    if module is qwen3:
        names.update(max_position_embeddings=4096, tie_word_embeddings=True)
    layer = module.Attention(module.ModelArgs(**names))
    for number, (name, heads) in enumerate([("k_proj", HEADS), ("q_proj", QUERY_HEADS)], start=1):
        rows = uneven(heads, seed=number).reshape(-1, 1)
        layer[name].weight = normal(*layer[name].weight.shape, seed=number) * rows * 0.05
    norm = nn.RMSNorm(HIDDEN)
    norm.weight = 1 + 0.3 * normal(HIDDEN, seed=3)
    return layer, norm


def rms(layer, norm, name):
    heads, biased = {"k_proj": (HEADS, False), "q_proj": (QUERY_HEADS, True)}[name]
    return projection_rms(Projection(base_linear(layer[name])), norm, heads, biased)


def factors(layer, norm):
    queries = rms(layer, norm, "q_proj")
    return np.array(balance(rms(layer, norm, "k_proj"), queries, layer.rope))


@every_layout
def test_geometric_mean_is_1(layout):
    s = np.array(balance(uneven(HEADS, 1), uneven(QUERY_HEADS, 2), rope(*layout)))
    assert s.shape == (HEADS, 1, DIM)
    np.testing.assert_allclose(np.log(s).mean(axis=-1), 0, atol=1e-5)
    assert s.std() > 0.1


@every_layout
def test_channels_of_a_rotary_pair_weigh_the_same_and_others_do_not(layout):
    s = np.array(balance(uneven(HEADS, 1), uneven(QUERY_HEADS, 2), rope(*layout)))[:, 0]
    first, second = pairs(*layout).T
    np.testing.assert_array_equal(s[:, first], s[:, second])
    for head in s:
        assert len(np.unique(head)) == len(first) + DIM - layout[0]


@every_layout
def test_balance_commutes_with_the_rotation_by_position(layout):
    turn = rope(*layout)
    s = balance(uneven(HEADS, 1), uneven(QUERY_HEADS, 2), turn)
    x = normal(1, HEADS, 9, DIM, seed=5)
    np.testing.assert_allclose(turn(x * s, offset=70), turn(x, offset=70) * s, atol=1e-4)


def test_factors_are_those_of_least_error_by_cauchy_schwarz():
    first, second = pairs(DIM, False).T
    keys, queries = (np.array(uneven(HEADS, seed)) for seed in (1, 2))
    keys[:, second], queries[:, second] = keys[:, first], queries[:, first]
    s = np.array(balance(mx.array(keys), mx.array(queries), rope(DIM, False)))[:, 0]

    def error(s):
        return np.sum((queries * s) ** 2, axis=-1) * np.sum((keys / s) ** 2, axis=-1)

    least = np.sum(queries * keys, axis=-1) ** 2
    np.testing.assert_allclose(error(s), least, rtol=1e-4)
    assert (error(np.ones(DIM)) > 1.5 * least).all()


def test_layers_without_positions_are_balanced_too():
    keys, queries = uneven(HEADS, 1), uneven(QUERY_HEADS, 2)
    s = balance(keys, queries, None)
    assert s.shape == (HEADS, 1, DIM) and mx.all(mx.isfinite(s))
    np.testing.assert_allclose(np.log(s).mean(axis=-1), 0, atol=1e-5)


def test_dead_channels_keep_the_factors_finite():
    keys, queries = mx.zeros((HEADS, DIM)), uneven(QUERY_HEADS, 2)
    assert mx.all(mx.isfinite(balance(keys, queries, rope(DIM, False))))
    assert mx.all(mx.isfinite(balance(uneven(HEADS, 1), 0 * queries, rope(DIM, False))))


def test_queries_are_averaged_over_the_heads_that_share_a_key():
    keys = uneven(HEADS, 1)
    queries = uneven(HEADS, 2)
    shared = mx.repeat(queries, QUERY_HEADS // HEADS, axis=0)
    np.testing.assert_allclose(
        balance(keys, shared, rope(DIM, False)), balance(keys, queries, rope(DIM, False)), rtol=1e-5
    )


@every_layout
def test_rescaling_keys_against_queries_changes_no_product_and_no_code(layout):
    turn = rope(*layout)
    # A power of two for each pair and each other channel, so that nothing is rounded; as
    # many up as down, so that the geometric mean stays.
    factor = np.array([0.25, 0.5, 2, 4], np.float32)
    c = np.resize(factor, DIM)
    c[pairs(*layout)] = np.resize(factor, layout[0] // 2)[:, None]
    c = mx.array(c)
    layer, norm = attention()
    layer.rope = turn
    hidden = norm(normal(1, 40, HIDDEN, seed=6))
    made = []
    for rescaled in (False, True):
        if rescaled:
            layer.k_proj.weight = layer.k_proj.weight * mx.tile(c, HEADS)[:, None]
            layer.q_proj.weight = layer.q_proj.weight / mx.tile(c, QUERY_HEADS)[:, None]
        s = mx.array(factors(layer, norm))
        keys, queries = (
            turn(layer[name](hidden).reshape(1, 40, heads, DIM).swapaxes(1, 2))
            for name, heads in (("k_proj", HEADS), ("q_proj", QUERY_HEADS))
        )
        codec = KVCodec(CodecSpec(DIM, DIM), s)
        encoded = codec.encode_keys(keys, 0)
        decoded = mx.repeat(codec.decode_keys(encoded, 0), QUERY_HEADS // HEADS, axis=1)
        made.append((np.array(queries @ decoded.swapaxes(-1, -2)), s, encoded))
    (before, s_before, codes_before), (after, s_after, codes_after) = made
    np.testing.assert_allclose(s_after, s_before * c, rtol=1e-5)
    same = [np.mean(np.array(a) == np.array(b)) for a, b in zip(codes_before, codes_after)]
    assert min(same) > 0.99
    assert np.square(before - after).mean() < 1e-4 * np.square(before).mean()


# Root mean squares from the weights


def test_rms_from_the_weights_is_that_of_random_inputs():
    layer, norm = attention()
    hidden = normal(4000, HIDDEN, seed=7) * norm.weight
    for name, heads in (("k_proj", HEADS), ("q_proj", QUERY_HEADS)):
        measured = np.sqrt(np.mean(np.square(layer[name](hidden)), axis=0)).reshape(heads, DIM)
        np.testing.assert_allclose(measured, rms(layer, norm, name), rtol=0.06)


def test_bias_counts_for_queries_but_not_for_keys():
    layer, norm = attention(qwen2)
    layer.q_proj.bias = mx.zeros(QUERY_HEADS * DIM)
    layer.k_proj.bias = mx.zeros(HEADS * DIM)
    keys = rms(layer, norm, "k_proj")
    queries = rms(layer, norm, "q_proj")
    layer.q_proj.bias = mx.full((QUERY_HEADS * DIM,), 3.0)
    layer.k_proj.bias = mx.full((HEADS * DIM,), 300.0)
    np.testing.assert_array_equal(rms(layer, norm, "k_proj"), keys)
    np.testing.assert_allclose(
        rms(layer, norm, "q_proj"), np.sqrt(np.square(queries) + 9), rtol=1e-5
    )


@pytest.mark.parametrize(
    "quantization, tolerance",
    [
        ({"group_size": 64, "bits": 8}, 0.002),
        ({"group_size": 64, "bits": 4}, 0.03),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, 0.06),
    ],
    ids=["8-bit", "4-bit", "mxfp4"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_quantized_projections_have_nearly_the_factors_of_dense_ones(quantization, tolerance, bias):
    layer, norm = attention(attention_bias=bias)
    dense = factors(layer, norm)
    for name in ("k_proj", "q_proj"):
        layer[name] = nn.QuantizedLinear.from_linear(layer[name], **quantization)
    np.testing.assert_allclose(factors(layer, norm), dense, rtol=tolerance)


@pytest.mark.parametrize("adapter", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_have_nearly_the_factors_of_what_they_adapt(adapter, quantized):
    layer, norm = attention()
    if quantized:
        layer.k_proj = nn.QuantizedLinear.from_linear(layer.k_proj)
    plain = factors(layer, norm)
    layer.k_proj = adapter.from_base(layer.k_proj)
    layer.k_proj.lora_b = normal(*layer.k_proj.lora_b.shape) * 1e-3
    np.testing.assert_allclose(factors(layer, norm), plain, rtol=1e-6)
    layer.k_proj = layer.k_proj.fuse()
    np.testing.assert_allclose(factors(layer, norm), plain, rtol=0.1)


def test_models_that_normalise_heads_go_by_the_weights_of_those_norms():
    layer, norm = attention(qwen3)
    layer.k_norm.weight = -uneven(1, 8)[0]
    layer.q_norm.weight = uneven(1, 9)[0]
    register(qwen3.Attention, qwen3.__name__, FAMILIES["qwen3"])
    expected = balance(
        mx.broadcast_to(mx.abs(layer.k_norm.weight), (HEADS, DIM)),
        mx.broadcast_to(mx.abs(layer.q_norm.weight), (QUERY_HEADS, DIM)),
        layer.rope,
    )
    s = np.array(known_layer(layer, norm).codec.balance)
    np.testing.assert_allclose(s, expected, rtol=1e-6)
    # The projections' own weights do not matter then.
    layer.k_proj.weight = layer.k_proj.weight * uneven(HEADS, 5).reshape(-1, 1)
    np.testing.assert_array_equal(known_layer(layer, norm).codec.balance, s)
    assert s.std() > 0.1


@pytest.mark.parametrize(
    "norm, weight",
    [
        # One weight for each channel of every head, of all heads, and its difference to 1.
        (cohere.LayerNorm2D(HEADS, DIM, 1e-9), lambda w: w),
        (nn.RMSNorm(HEADS * DIM, 1e-9), lambda w: w),
        (gemma3_text.RMSNorm(DIM, 1e-9), lambda w: 1 + w),
    ],
    ids=["cohere", "olmo2", "gemma3"],
)
def test_norms_are_known_by_what_they_make_of_ones(norm, weight):
    norm.weight = normal(*norm.weight.shape, seed=8)
    expected = np.broadcast_to(np.array(weight(norm.weight)).reshape(-1, DIM), (HEADS, DIM))
    np.testing.assert_allclose(norm_rms(norm, HEADS, DIM), np.abs(expected), rtol=1e-4)

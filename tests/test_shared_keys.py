"""Layers that have no keys of their own and read those of another."""

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models import cache as mlx_lm_cache
from test_models import CHUNKS, TOKENS, check_batch, compressed_parts, enable, error, run

import mlx_turboquant_plugin
from mlx_turboquant_plugin.integration import upstream

GEMMA4 = dict(num_hidden_layers=4, layer_types=tiny_models.SLIDING * 2, num_kv_shared_layers=2)


def test_arrays_of_one_layer_serve_others():
    model = tiny_models.build("gemma4_text", **GEMMA4)
    mlx_turboquant_plugin.disable()
    expected, _ = run(model, TOKENS, CHUNKS)
    enable(bypass="identity")
    identity, caches = run(model, TOKENS, CHUNKS)
    assert len(compressed_parts(caches)) == 2
    assert error(identity, expected) < 1e-4
    enable()
    made, caches = run(model, TOKENS, CHUNKS)
    # Both layers have codes, in a model of random weights.
    assert 1e-5 < error(made, expected) < 0.5
    # Whoever gets all keys still reads their codes where that is faster.
    assert [cache.read for cache in caches] == [True, True]
    check_batch(model)


def test_only_a_layer_that_others_read_is_given_all_keys():
    model = tiny_models.build(
        "gemma4_text",
        num_hidden_layers=6,
        layer_types=tiny_models.SLIDING * 3,
        num_kv_shared_layers=2,
    )
    enable()
    caches = run(model, TOKENS, CHUNKS)[1]
    assert [cache.reading.expected for cache in caches] == [False, False, True, True]


@pytest.mark.parametrize("name, special", [("gemma4_text", GEMMA4), ("afm7", {})])
def test_arrays_for_others_are_not_invariant(name, special, caplog):
    model = tiny_models.build(name, **special)
    enable(invariant=True)
    assert not compressed_parts(mlx_lm_cache.make_prompt_cache(model))
    [line] = [record.getMessage() for record in caplog.records]
    assert "runs uncompressed" in line and "TURBOQUANT_INVARIANT" in line


def test_a_layer_that_follows_reads_what_the_first_has_read():
    model = tiny_models.build("gemma3n")
    enable(invariant=True)
    tokens = TOKENS[:, :140]
    whole, caches = run(model, tokens, (140,))
    # Layers 2 and 3 follow the last ones before them of their kinds.
    assert [cache.reading.followed for cache in caches] == [True, True]
    assert error(run(model, tokens, (50, 70, 20))[0], whole) < 1e-4
    last = model.layers[-1].self_attn
    assert all(cache.attention() is not last for cache in caches)


def test_who_is_followed_is_learned_in_the_first_pass():
    model = tiny_models.build("gemma3n", text_config=followed_by_few())
    enable()
    caches = run(model, TOKENS, (60, 60, 1))[1]
    assert [cache.reading.followed for cache in caches] == [False, False, True, True]
    assert all(cache.passed is None for cache in caches)


def followed_by_few():
    config = tiny_models.SPECIAL["gemma3n"]["text_config"]
    six = dict(layer_types=tiny_models.SLIDING * 3, activation_sparsity_pattern=[0.0] * 6)
    return {**config, **six, "num_hidden_layers": 6}


def test_layers_do_not_follow_where_nobody_says_when(monkeypatch):
    model = tiny_models.build("gemma3n")
    enable()
    monkeypatch.setattr(upstream, "available", lambda: True)
    assert not compressed_parts(mlx_lm_cache.make_prompt_cache(model))
    assert "hooks" in mlx_turboquant_plugin.status().models[-1]


def test_a_layer_may_follow_outside_of_a_pass():
    model = tiny_models.build("gemma3n")
    enable()
    caches = run(model, TOKENS, CHUNKS)[1]
    last, cache = model.layers[-1].self_attn, caches[-1]
    x = mx.random.normal((1, 1, 128), key=mx.random.key(0))
    expected = last(x, None, cache.to_exact(), offset=cache.offset - 1)
    made = last(x, None, cache, offset=cache.offset - 1)
    assert mx.allclose(made, expected, atol=1e-4)
    assert cache.attention() is not last and not cache.attending

"""Models whose attention does not call mlx-lm's function, or does more than call it."""

import functools
import logging
from types import ModuleType

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from filled_caches import batched, filled, plain, random, rows_of
from mlx_lm.models import base, qwen2
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.cache.reading import Reading
from mlx_turboquant_plugin.integration import table
from mlx_turboquant_plugin.integration.attention import patch_family
from mlx_turboquant_plugin.integration.family import register


def by_mlx_lm(queries, keys, values, cache, scale, mask):
    return module.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask
    )


def by_itself(queries, keys, values, cache, scale, mask):
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


class Attention(qwen2.Attention):
    """Attends by the function ``attend`` alone, and updates its cache ``updates`` times."""

    attend = staticmethod(by_mlx_lm)
    updates = 1

    def __call__(self, x, mask=None, cache=None):
        if isinstance(cache, CacheList):
            cache = cache[1]
        queries, keys, values = (
            linear(x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
            for linear, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        queries, keys = (self.rope(x, offset=cache.offset) for x in (queries, keys))
        parts = self.updates if x.shape[1] > 1 else 1
        outs = []
        for q, *pair in zip(*(mx.split(one, parts, axis=2) for one in (queries, keys, values))):
            outs.append(self.attend(q, *cache.update_and_fetch(*pair), cache, self.scale, mask))
        out = mx.concatenate(outs, axis=2)
        return self.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1))


module = ModuleType("private")
module.Attention, module.scaled_dot_product_attention = Attention, base.scaled_dot_product_attention


def enable(**settings):
    mlx_turboquant_plugin.enable(window=32, kernel="eager", **settings)
    patch_family(module, table.OWN)


def load(attention=Attention):
    """A model with that attention, in fp32, and tokens (1, 230)."""
    model, tokenizer = mlx_lm.load(str(tiny.PATHS["tiny-qwen2"]))
    model.set_dtype(mx.float32)
    for layer in model.layers:
        layer.self_attn.__class__ = attention
    return model, mx.array(tiny.text_tokens(tokenizer, 230))[None]


def rings(model, keep=4):
    caches = mlx_lm_cache.make_prompt_cache(model, 100)
    for cache in caches:
        assert cache.max_size == 100
        cache.__init__(100, keep, cache.codec, cache.visibility, cache.kernel)
    return caches


def single(model, tokens, make):
    logits, caches = tiny.logits(model, tokens[:, :200], make(model), chunk=50)
    more, _ = tiny.logits(model, tokens[:, 200:210], caches, chunk=1)
    return np.concatenate([logits[0], more[0]])


def batch(model, tokens, make):
    """Two rows of different lengths, in which the shorter one is padded on the right, too."""
    rows = [tiny.logits(model, tokens[:, :n], make(model), chunk=50)[1] for n in (150, 70)]
    caches = [row[0].merge(row) for row in zip(*rows)]
    for cache in caches:
        cache.prepare(lengths=[30, 20], right_padding=[0, 10])
    rows = mx.concatenate([tokens[:, 150:180], tokens[:, 70:100]])
    prompt, _ = tiny.logits(model, rows, caches, chunk=30)
    for cache in caches:
        cache.finalize()
    rows = mx.concatenate([tokens[:, 180:190], tokens[:, 90:100]])
    logits, _ = tiny.logits(model, rows, caches, chunk=1)
    return np.concatenate([prompt[0], prompt[1, :20], *logits])


def padded(model, tokens, make):
    """Two rows, of which the second begins later."""
    rows = [make(model), make(model)]
    caches = [row[0].merge(row) for row in zip(*rows)]
    for cache in caches:
        cache.prepare(left_padding=[0, 60])
    rows = mx.concatenate([tokens[:, :150], tokens[:, 50:200]])
    prompt, _ = tiny.logits(model, rows, caches, chunk=50)
    rows = mx.concatenate([tokens[:, 150:160], tokens[:, 200:210]])
    logits, _ = tiny.logits(model, rows, caches, chunk=1)
    return np.concatenate([prompt[0], prompt[1, 60:], *logits])


def by_itself_in_steps(queries, keys, *rest):
    return (by_itself if queries.shape[2] == 1 else by_mlx_lm)(queries, keys, *rest)


def by_itself_in_prompts(queries, keys, *rest):
    return (by_mlx_lm if queries.shape[2] == 1 else by_itself)(queries, keys, *rest)


def over_other_arrays(queries, keys, values, *rest):
    return by_mlx_lm(queries, keys[:, :, :, :], values * 1.0, *rest)


def over_attributes(queries, keys, values, cache, *rest):
    pair = (x[:, :, : cache.offset] for x in (cache.keys, cache.values))
    return by_itself(queries, *pair, cache, *rest)


def in_two_halves(queries, *rest):
    halves = mx.split(queries.reshape(queries.shape[0], 2, -1, *queries.shape[2:]), 2, axis=2)
    outs = [by_mlx_lm(half.flatten(1, 2), *rest) for half in halves]
    outs = [out.reshape(half.shape) for out, half in zip(outs, halves)]
    return mx.concatenate(outs, axis=2).reshape(queries.shape)


def and_mean_key(attend, queries, keys, values, *rest):
    mean = mx.mean(keys.astype(mx.float32), axis=2, keepdims=True)
    return attend(queries, keys, values, *rest) + mx.repeat(
        mean, queries.shape[1] // keys.shape[1], 1
    )


PRIVATE = [
    by_itself,
    by_itself_in_steps,
    by_itself_in_prompts,
    over_other_arrays,
    over_attributes,
    in_two_halves,
]
KINDS = {
    # That of the module changes with the plugin.
    "plain": lambda model: mlx_lm_cache.make_prompt_cache(model),
    "ring": rings,
    "ring that keeps nothing": lambda model: rings(model, 0),
}


@pytest.mark.parametrize("kind, bypass", [*((kind, None) for kind in KINDS), ("ring", "identity")])
@pytest.mark.parametrize("way", [single, batch, padded])
def test_private_attention_sees_what_mlx_lms_function_would(way, kind, bypass, monkeypatch):
    enable(bypass=bypass)
    expected = way(*load(), KINDS[kind])
    monkeypatch.setattr(Attention, "attend", staticmethod(by_itself))
    assert np.abs(way(*load(), KINDS[kind]) - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("attend", PRIVATE)
def test_attention_may_be_private_now_and_then(attend, monkeypatch):
    enable()
    expected = single(*load(), mlx_lm_cache.make_prompt_cache)
    monkeypatch.setattr(Attention, "attend", staticmethod(attend))
    made = single(*load(), mlx_lm_cache.make_prompt_cache)
    assert np.abs(made - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind, updates", [*((kind, 1) for kind in KINDS), ("plain", 2)])
def test_attention_may_compute_with_keys_beside_mlx_lms_function(kind, updates, caplog):
    # Codes that rounding tips would count.
    enable(bypass="identity")
    outputs = []
    for attend in (by_itself, by_mlx_lm):
        both = staticmethod(functools.partial(and_mean_key, attend))
        # How a class reads is found out once.
        attention = type("Both", (Attention,), {"attend": both, "updates": updates})
        register(attention, module.__name__, table.OWN)
        outputs.append(single(*load(attention), KINDS[kind]))
    expected, made = outputs
    assert np.abs(made - expected).max() < 2e-4 * np.abs(expected).max()
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "does not leave its keys" in line


def test_it_is_said_once_and_how_to_leave_the_model_out(monkeypatch, caplog):
    enable()
    monkeypatch.setattr(Attention, "attend", staticmethod(by_itself))
    for _ in range(2):
        single(*load(), mlx_lm_cache.make_prompt_cache)
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        line.startswith("qwen2: its attention does not leave its keys")
        and "TURBOQUANT_OPT_OUT=qwen2" in line
    )


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("rows", [1, 2])
def test_who_has_read_views_must_go_on(rows, count, monkeypatch):
    enable()
    model, tokens = load()
    caches = mlx_lm_cache.make_prompt_cache(model)
    if rows > 1:
        caches = [cache.merge([cache] * rows) for cache in caches]
    tokens = mx.concatenate([tokens] * rows)
    tiny.logits(model, tokens[:, :150], caches, chunk=150)
    tiny.logits(model, tokens[:, 150:153], caches, chunk=1)
    before = [cache.size() for cache in caches]
    expected, _ = tiny.logits(model, tokens[:, :count], [*map(copied, caches)], chunk=count)
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "attend", staticmethod(by_itself))
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"attention of qwen2 .*TURBOQUANT_OPT_OUT=qwen2"
            ):
                model(tokens[:, :count], cache=caches)
    assert [cache.size() for cache in caches] == before
    again, _ = tiny.logits(model, tokens[:, :count], caches, chunk=count)
    np.testing.assert_array_equal(again, expected)


def copied(cache):
    return cache.__deepcopy__({})


@pytest.mark.parametrize("attend", [by_mlx_lm, by_itself])
def test_in_a_list_of_caches(attend, monkeypatch):
    """As with a cache alone and mlx-lm's function."""
    enable()

    def outputs(listed):
        model, _ = load()
        attention, cache = model.layers[0].self_attn, mlx_lm_cache.make_prompt_cache(model)[0]
        given = CacheList(ArraysCache(1), cache) if listed else cache
        shape = 1, 300, attention.q_proj.weight.shape[1]
        x = mx.random.normal(shape, key=mx.random.key(0))
        prompt = attention(x, "causal", given)
        assert cache.attention() is attention
        return [np.array(prompt), *(np.array(attention(x[:, :1], None, given)) for _ in range(3))]

    expected = outputs(listed=False)
    monkeypatch.setattr(Attention, "attend", staticmethod(attend))
    for made, other in zip(outputs(listed=True), expected):
        np.testing.assert_allclose(made, other, atol=1e-5)


def test_a_hooked_cache_whose_view_nobody_reads_has_returned_all_keys(monkeypatch, caplog):
    monkeypatch.setattr(CompressedKVCache, "hooked", True)
    cache, other = filled(plain()), filled(plain())
    for count in (1, 20):
        more = random(count, seed=count)
        keys, _ = cache.update_and_fetch(*more)
        assert keys.shape[2] == cache.offset
        assert mx.array_equal(keys, other.update_and_fetch(*more)[0])
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("make", [lambda: filled(plain()), batched], ids=["single", "batched"])
def test_returning_all_keys_leaves_it_to_a_kernel_to_join_them(make):
    cache = make()
    cache.attending, cache.reading = True, Reading("qwen2")
    keys, _ = cache.update_and_fetch(*random(1, rows_of(cache)))
    assert keys.shape[2] > 300
    holder = cache if rows_of(cache) == 1 else cache.view.rows
    assert holder.full_tokens.unjoined is not None

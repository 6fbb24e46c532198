"""Which problems go to a fused kernel, and what is said about the others."""

import logging
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.generate import _merge_caches
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from test_attention import LEARNED, Case, close, step

import mlx_turboquant_plugin
from mlx_turboquant_plugin.attention import fused
from mlx_turboquant_plugin.backends import (
    BACKENDS,
    CHOICES,
    available_kernels,
    backend,
    fused_kernels,
)
from mlx_turboquant_plugin.backends.choice import resolve_kernel
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.rules import BYPASSES, KERNELS


def solved(problem):
    """What a kernel makes of a problem, by MLX's operations."""
    full, codec, start = problem.full_tokens, problem.codec, problem.first_quantized
    keys = mx.concatenate([full.keys, codec.decode_keys(problem.key_codes, start)], axis=2)
    values = mx.concatenate([full.values, codec.decode_values(problem.value_codes)], axis=2)
    slots, codes = mx.arange(full.count), mx.arange(keys.shape[2] - full.count)
    sink, code, hidden, newest = mx.split(problem.bounds, 4, axis=-1)
    count = problem.queries.shape[2]
    seen = slots >= mx.where(slots < problem.sinks, sink, full.count - newest)
    seen = seen & (slots <= mx.arange(full.count - count, full.count)[:, None])
    seen_codes = (codes >= code) & (codes < codes.size - hidden)
    return mx.fast.scaled_dot_product_attention(
        problem.queries,
        keys,
        values,
        scale=problem.scale,
        mask=mx.concatenate([seen, seen_codes], axis=-1)[:, None],
        sinks=problem.learned_sinks,
    )


@pytest.fixture
def module(monkeypatch):
    """Stands for the Metal kernels; keeps the problems that it is given."""
    seen = []

    def attend(problem):
        seen.append(problem)
        return solved(problem)

    metal = backend("metal")
    monkeypatch.setattr(metal, "attend", attend)
    monkeypatch.setattr(metal, "encode", KVCodec.encode)
    # Nor does a prompt's pass launch anything.
    monkeypatch.setattr(metal, "passes", lambda *args: False)
    monkeypatch.setattr(fused, "_fallbacks", [])
    return SimpleNamespace(seen=seen)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_queries_go_to_the_kernel(count, module):
    case = Case(count=count, batch=2)
    close(case.run("metal"), case.expected())
    (problem,) = module.seen
    assert problem.bounds.shape == (2, count, 4)
    assert mx.array_equal(problem.queries, case.queries)
    # Window 64, sinks 4: the block of 32 that the query is in, and two more, are in full precision.
    full_from = [position // 32 * 32 - 64 for position in range(case.length - count, case.length)]
    quantized = problem.key_codes[-1].shape[-1]
    expected = [[0, 4, quantized - first, case.length - first] for first in full_from]
    assert problem.bounds.tolist() == [expected] * 2
    assert mlx_turboquant_plugin.status().fallbacks == []


def test_others_do_not(module):
    for case in (Case(count=9), Case(length=60)):
        close(case.run("metal"), case.expected())
    assert module.seen == [] and fused.fallbacks() == []


@pytest.mark.parametrize("rows", [1, 2])
def test_learned_sinks_are_part_of_the_problem(rows, module):
    case, kernel = Case(), "metal"
    cache = case.cache(kernel)
    if rows > 1:
        cache = CompressedKVCache.merge([cache] * rows)
    new = [mx.repeat(x[:, :, -1:], rows, axis=0) for x in (case.queries, case.keys, case.values)]
    out = step(cache, *new, case.scale, None, LEARNED)
    close(out, np.repeat(case.expected(np.array(LEARNED)), rows, axis=0))
    (problem,) = module.seen
    assert problem.learned_sinks is LEARNED and problem.queries.shape[0] == rows
    assert fused.fallbacks() == []


@pytest.mark.parametrize("count", [1, 5])
def test_a_ring_that_forgets_and_holds_no_codes_is_for_mlx_lm(count, module):
    mx.random.seed(count)
    ours = RotatingCompressedKVCache(60, 4, Case().codec, Visibility(64), "metal")
    stock = RotatingKVCache(60, 4)
    for cache in (ours, stock):
        cache.update_and_fetch(*mx.zeros((2, 1, 2, 100, 64)))
    queries, new = mx.random.normal((1, 4, count, 64)), mx.random.normal((2, 1, 2, count, 64))
    masks = [cache.make_mask(count) for cache in (ours, stock)]
    out = step(ours, queries, *new, 0.1, masks[0])
    keys, values = stock.update_and_fetch(*new)
    expected = scaled_dot_product_attention(queries, keys, values, stock, 0.1, masks[1])
    # In the order of time: RotatingKVCache overwrites its oldest token by a single one.
    close(out, np.array(expected), 1e-6)
    assert module.seen == [] and fused.fallbacks() == []


# With the windows for which layers with learned sinks hold codes.
SLIDING = [
    ("gpt_oss", (30, 110)),
    ("mimo_v2_flash", (110,)),
    ("gemma3_text", ()),
    *(pytest.param(name, (), marks=pytest.mark.slow) for name in ("cohere2", "olmo3", "llama")),
]


# Windows of fewer tokens than are in full precision, and of more.
@pytest.mark.parametrize("window", [30, 110])
@pytest.mark.parametrize("name, learned", SLIDING)
def test_sliding_windows_and_learned_sinks(name, learned, window, module, monkeypatch):
    monkeypatch.setattr(backend("metal"), "runs_here", lambda: True)
    model = tiny_models.build(name, sliding_window=window, sliding_window_size=window)
    tokens = mx.random.randint(0, 64, (1, 200), key=mx.random.key(0))

    def logits(kernel):
        mlx_turboquant_plugin.disable()
        mlx_turboquant_plugin.enable(window=32, sinks=2, kernel=kernel)
        rows, parts = [], []
        for length in (180, 130):
            rows.append(make_prompt_cache(model))
            model(tokens[:, :length], cache=rows[-1])
        for caches, batch in ((rows[0], 1), (_merge_caches(rows), 2)):
            for start, count in ((180, 1), (181, 4), (185, 3), (188, 1)):
                new = mx.repeat(tokens[:, start : start + count], batch, axis=0)
                parts.append(mx.flatten(model(new, cache=caches)))
        return mx.concatenate(parts)

    expected = logits("eager")
    assert module.seen == []
    np.testing.assert_allclose(logits("metal"), expected, atol=1e-4)
    assert fused.fallbacks() == []
    assert {problem.first_quantized > 0 for problem in module.seen} == {False, window == 110}
    assert any(problem.learned_sinks is not None for problem in module.seen) == (window in learned)


@pytest.mark.parametrize("mask", [False, True])
def test_what_falls_back_is_said_once_and_in_status(mask, module, monkeypatch, caplog):
    monkeypatch.setattr(backend("metal"), "unsupported", lambda problem: "this")
    case = Case(count=2)
    given = mx.tril(mx.ones((2, case.length), mx.bool_), case.length - 2) if mask else "causal"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            close(case.run("metal", mask=given), case.expected())
    said = "masks other than the causal one" if mask else "this"
    message = f"the metal kernel does not support {said}: the compiled one serves instead"
    assert [record.message for record in caplog.records] == [message]
    assert mlx_turboquant_plugin.status().fallbacks == [message]
    mlx_turboquant_plugin.disable()
    assert mlx_turboquant_plugin.status().fallbacks == []


def test_what_falls_back_names_what_serves(module, monkeypatch):
    monkeypatch.setattr(backend("metal"), "compiled", False)
    monkeypatch.setattr(backend("metal"), "unsupported", lambda problem: "this")
    case = Case()
    close(case.run("metal"), case.expected())
    assert fused.fallbacks() == [
        "the metal kernel does not support this: the eager one serves instead"
    ]


def test_the_best_kernel_is_the_default(monkeypatch):
    monkeypatch.setattr(backend("metal"), "runs_here", lambda: True)
    assert available_kernels() == ["metal", "compiled", "eager"]
    assert resolve_kernel("auto") == resolve_kernel("metal") == "metal"


def test_backends_have_the_names_that_settings_allow():
    assert set(KERNELS) == {"auto", *CHOICES}
    assert set(BACKENDS) - set(CHOICES) == {"bridge"} < set(BYPASSES)
    assert all(backend(name).name == name for name in BACKENDS)


def test_fused_kernels_need_the_gpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert fused_kernels() == []
    finally:
        mx.set_default_device(device)

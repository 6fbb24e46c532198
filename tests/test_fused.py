"""Which problems go to a fused kernel, and what is said about the others."""

import logging
from types import SimpleNamespace

import mlx.core as mx
import pytest
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
from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.rules import BYPASSES, KERNELS


@pytest.fixture
def module(monkeypatch):
    """Stands for the Metal kernels; keeps the problems that it is given."""
    seen = []

    def attend(problem):
        seen.append(problem)
        return mx.zeros((*problem.queries.shape[:3], problem.exact_tokens.values.shape[-1]))

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
    assert mx.all(case.run("metal") == 0).item()
    (problem,) = module.seen
    assert problem.bounds.shape == (2, count, 4)
    assert mx.array_equal(problem.queries, case.queries)
    # Window 64, sinks 4: the block of 32 that the query is in, and two more, are exact.
    exact_from = [position // 32 * 32 - 64 for position in range(case.length - count, case.length)]
    coded = problem.key_codes[-1].shape[-1]
    expected = [[0, 4, coded - first, case.length - first] for first in exact_from]
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
    step(cache, *new, case.scale, None, LEARNED)
    (problem,) = module.seen
    assert problem.learned_sinks is LEARNED and problem.queries.shape[0] == rows
    assert fused.fallbacks() == []


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

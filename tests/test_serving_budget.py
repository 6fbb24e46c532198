"""mlx_lm.server within a memory budget."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from served_model import (  # noqa: F401
    MODEL,
    TEXT,
    TOKENIZER,
    TOKENS,
    InProcess,
    filled,
    model_path,
    prompts,
    text_of,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.cache.sizes import Row
from mlx_turboquant_plugin.serving.counts import Counts
from mlx_turboquant_plugin.serving.generator import BudgetedGenerator
from mlx_turboquant_plugin.serving.prompt_store import PromptStore
from mlx_turboquant_plugin.serving.sizes import Footprint, uncompressed_nbytes


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "lengths, settings",
    [([20], {}), ([100, 450], {}), ([400], {"window": 32})],
)
def test_rows_take_what_was_expected_and_no_more(lengths, settings):
    mlx_turboquant_plugin.enable(**settings)
    expected = Footprint([MODEL], 512).batch([Row(1, length + 40) for length in lengths])
    generator = BatchGenerator(MODEL, prefill_step_size=512)
    generator.insert([TOKENS[:length] for length in lengths], [40] * len(lengths))
    most = 0
    while any(generator.next()):
        most = max(most, generator.prompt_cache_nbytes)
    assert 0.92 * expected < most <= expected


def test_a_cut_cache_and_one_that_rotates_take_no_more_than_expected():
    mlx_turboquant_plugin.enable()
    caches = filled(900)
    for cache in caches:
        cache.trim(900 - 599)
    nbytes = sum(cache.nbytes for cache in caches)
    footprint = Footprint([MODEL], 512)
    assert footprint.row(Row(1, 610)) < nbytes + 208 * 4 * 1024
    for _ in range(10):
        MODEL(mx.array([[5]]), cache=caches)
        assert sum(cache.nbytes for cache in caches) <= footprint.row(Row(600, 610))
    [size] = footprint._sizes
    ring = mlx_turboquant_plugin.cache.RotatingCompressedKVCache(256, 4, caches[0].codec)
    for step in (500, *[1] * 40):
        ring.update_and_fetch(*2 * [mx.ones((1, 2, step, 64))])
        row = Row(1, ring.offset)
        expected = replace(size, visibility=ring.visibility, ring=ring.ring).most(row, 500)
        assert ring.nbytes <= expected < 1.3 * ring.nbytes


def test_uncompressed_layers_are_counted_with_their_room():
    mlx_turboquant_plugin.enable(opt_out=("llama",))
    footprint = Footprint([MODEL], 512)
    for length in (10, 300):
        caches = filled(length)
        nbytes = sum(cache.nbytes for cache in caches)
        assert nbytes <= footprint.row(Row(1, length)) < nbytes + 256 * 1024 * len(caches)


def test_as_uncompressed():
    exact = 700 * 2 * 2 * 64 * 4 * len(MODEL.layers)
    mlx_turboquant_plugin.enable()
    caches = filled(700)
    assert uncompressed_nbytes(caches) == exact
    batch = [cache.merge([cache, cache]) for cache in caches]
    assert uncompressed_nbytes(batch) == 2 * exact
    MODEL(mx.array([[1], [2]]), cache=batch)
    assert uncompressed_nbytes(batch) == 2 * exact * 701 // 700
    assert sum(cache.nbytes for cache in batch) < exact


def test_requests_wait_for_room_and_get_what_they_get_alone(model_path, monkeypatch):
    most = []

    def next_counted(self):
        result = BudgetedGenerator.next(self)
        store = self._admission._store
        most.append((self.prompt_cache_nbytes + store.nbytes, len(self.rows)))
        return result

    questions = prompts(5, 600)
    mlx_turboquant_plugin.enable(invariant=True)
    footprint = Footprint([MODEL], 512)
    with InProcess(model_path) as alone:
        expected = list(map(text_of, map(alone.complete, questions)))
    mlx_turboquant_plugin.disable()
    # Three of the longest, and not four.
    limit = int(3.5 * footprint.row(Row(len(TOKENIZER.encode(questions[0])), 200)))
    mlx_turboquant_plugin.enable(invariant=True, memory_budget=str(limit))
    counted = type("Counted", (BudgetedGenerator,), {"next": next_counted})
    monkeypatch.setattr("mlx_turboquant_plugin.serving.wrappers.BudgetedGenerator", counted)
    with InProcess(model_path) as served:
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(served.complete, questions))
        assert list(map(text_of, answers)) == expected
        assert max(nbytes for nbytes, _ in most) <= limit
        assert max(rows for _, rows in most) in (3, 4)
        status, answer = served.complete(TEXT, max_tokens=100_000)
        assert status == 413
        assert f"more than the server's TURBOQUANT_MEMORY_BUDGET of {limit}" in answer["error"]
        # So many as it says fit, and no more.
        tokens = int(answer["error"].split(", ")[-2].split()[0])
        assert footprint.row(Row(tokens, tokens)) <= limit
        assert footprint.row(Row(tokens + 1, tokens + 1)) > limit
        assert served.metric("turboquant_requests_refused_total") == 1
        assert served.metric("turboquant_requests_waiting") == 0
        # A client that hangs up, makes room.
        body = {"prompt": "On and on", "max_tokens": 1000, "stream": True}
        response = served.open("POST", "/v1/completions", body)
        response.readline()
        running = served.generator.turboquant.admission.generator
        assert len(running.rows) == 1
        response.close()
        wait_until(lambda: not running.rows)
        # A request with a seed is not batched, and drains what runs.
        assert text_of(served.complete(questions[0], seed=1)) == expected[0]
        assert served.complete(questions[0], max_tokens=10**6, seed=1)[0] == 413


@pytest.mark.parametrize("rows, copied", [(2.5, True), (1.2, False)])
def test_a_system_prompt_is_kept_if_there_is_room_for_a_copy(model_path, monkeypatch, rows, copied):
    extracted = []

    def noted(self, uids):
        found = BudgetedGenerator.extract_cache(self, uids)
        extracted.extend(bool(caches) for caches, _ in found.values())
        return found

    counted = type("Noted", (BudgetedGenerator,), {"extract_cache": noted})
    monkeypatch.setattr("mlx_turboquant_plugin.serving.wrappers.BudgetedGenerator", counted)
    mlx_turboquant_plugin.enable()
    limit = int(rows * Footprint([MODEL], 512).row(Row(300, 316)))
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(memory_budget=str(limit))
    system, user = ({"role": role, "content": TEXT[:500]} for role in ("system", "user"))
    with InProcess(model_path) as served:
        body = {"messages": [system, user], "max_tokens": 4}
        status, text = served.ask("POST", "/v1/chat/completions", body)
        assert status == 200
        assert 200 < json.loads(text)["usage"]["prompt_tokens"] <= 300
    # After the system's message, and after the user's.
    assert extracted == [copied, copied]


@pytest.mark.parametrize("name", ["lfm2", "mamba", "qwen3_next", "deepseek_v3", "llama4"])
def test_all_kinds_of_caches_are_counted(name):
    mlx_turboquant_plugin.enable()
    model = tiny_models.build(name)
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS[:40]]) % 64, cache=caches)
    assert uncompressed_nbytes(caches) > 0


def test_the_store_never_finds_a_whole_prompt_and_tells_what_it_evicts():
    mlx_turboquant_plugin.enable()
    plain = LRUPromptCache(2)
    plain.insert_cache("model", TOKENS[:50], filled(50))
    store = PromptStore.of(plain, Counts())
    assert store is plain
    found, rest = store.fetch_nearest_cache("model", TOKENS[:50])
    assert rest == TOKENS[49:50] and found[0].offset == 49
    store.insert_cache("model", TOKENS[:40], [])
    assert [entry.nbytes for entry in store.entries()] == [store.nbytes]
    # Fetched before it is evicted.
    store.set_aside("model", TOKENS[:60], 10**6)
    assert store.settle(0) and store.nbytes == 0 and not list(store.entries())
    found, rest = store.fetch_nearest_cache("model", TOKENS[:60])
    assert rest == TOKENS[50:60] and type(found[0]) is CompressedKVCache
    assert store.fetch_nearest_cache("model", TOKENS[:60]) == (None, TOKENS[:60])
    assert store._counts.misses == 1


def test_a_share_of_the_memory(monkeypatch):
    from mlx_turboquant_plugin.serving import memory

    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(mx, "device_info", lambda device: {})
    assert memory.budget_of("50%") == machine // 2
    monkeypatch.setattr(mx, "device_info", lambda device: {"memory_size": 1000})
    assert memory.budget_of("25 %") == 250
    assert memory.budget_of("1.5GB") == 1_500_000_000

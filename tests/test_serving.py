"""mlx_lm.server within a memory budget, with prompt caches on disk, and its metrics."""

import argparse
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer

import mlx.core as mx
import pytest
import tiny
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm import server
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from processes import ROOT, clean_environ
from server_process import Server, save_fp32

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.cache.sizes import Row
from mlx_turboquant_plugin.serving import disk_files
from mlx_turboquant_plugin.serving.counts import Counts
from mlx_turboquant_plugin.serving.disk_cache import DiskCache
from mlx_turboquant_plugin.serving.generator import BudgetedGenerator
from mlx_turboquant_plugin.serving.model_name import name_of
from mlx_turboquant_plugin.serving.prompt_store import PromptStore
from mlx_turboquant_plugin.serving.sizes import Footprint, uncompressed_nbytes

NAME = "tiny-llama"
MODEL, TOKENIZER = tiny.load(NAME)
TOKENS = tiny.text_tokens(TOKENIZER, 1000)
TEXT = tiny.TEXT.read_text("utf-8")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_fp32(folder, NAME)
    return folder / NAME


class InProcess:
    """The server of a model in this process, which others can look into."""

    def __init__(self, model_path, prompt_cache=LRUPromptCache):
        arguments = argparse.Namespace(
            model=str(model_path), adapter_path=None, draft_model=None, num_draft_tokens=3,
            trust_remote_code=False, chat_template="", use_default_chat_template=False, temp=0.0,
            top_p=1.0, top_k=0, min_p=0.0, max_tokens=16, chat_template_args={}, pipeline=False,
            decode_concurrency=32, prompt_concurrency=8, prefill_step_size=512, kv_bits=None,
            kv_group_size=64, quantized_kv_start=0,
            prompt_cache_bytes=None, allowed_origins="*",
        )  # fmt: skip
        provider = server.ModelProvider(arguments)
        self.generator = server.ResponseGenerator(provider, prompt_cache(10))

        def handler(*args, **kwargs):
            return server.APIHandler(self.generator, *args, system_fingerprint="", **kwargs)

        # A queue for all clients, not the five of Python's.
        ThreadingHTTPServer.request_queue_size = 64
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self.generator.stop_and_join()

    def open(self, method, path, body=None):
        """A response that is to be read."""
        connection = HTTPConnection("127.0.0.1", self._server.server_port, timeout=120)
        connection.request(method, path, body and json.dumps(body))
        return connection.getresponse()

    def ask(self, method, path, body=None):
        """(status, text of the answer)."""
        response = self.open(method, path, body)
        return response.status, response.read().decode()

    def complete(self, prompt, max_tokens=16, **options):
        """(status, parsed answer)."""
        body = {"prompt": prompt, "max_tokens": max_tokens, **options}
        status, text = self.ask("POST", "/v1/completions", body)
        return status, json.loads(text)

    def metric(self, name):
        """A line of the page of metrics as a number."""
        [line] = [x for x in self.ask("GET", "/metrics")[1].splitlines() if x.startswith(name)]
        return float(line.split()[-1])


def text_of(answer):
    assert answer[0] == 200, answer
    return answer[1]["choices"][0]["text"]


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def prompts(count, characters=1500):
    return [f"{31 * i} {TEXT[90 * i : 90 * i + characters - 60 * i]}" for i in range(count)]


def filled(count, tokens=TOKENS):
    """The caches of the first ``count`` tokens."""
    caches = make_prompt_cache(MODEL)
    MODEL(mx.array([tokens[:count]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


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


def test_what_was_evicted_is_read_from_disk_after_a_restart(model_path, tmp_path):
    settings = {"invariant": True, "memory_budget": "2MB", "disk_cache": f"{tmp_path}/disk:8MB"}
    questions = prompts(3, 1200)
    mlx_turboquant_plugin.enable(**settings)
    with InProcess(model_path) as served:
        firsts = [text_of(served.complete(question)) for question in questions]
        # One fits into memory.
        assert served.metric("turboquant_disk_cache_written_total") == 2
        again = served.complete(questions[0])
        assert text_of(again) == firsts[0]
        assert again[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 300
        hits = 'turboquant_prompt_cache_hits_total{source="disk"}'
        assert served.metric(hits) == 1
        saved = served.metric('turboquant_prompt_cache_tokens_saved_total{source="disk"}')
        assert saved == again[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        held = served.metric('turboquant_kv_bytes{caches="kept",form="compressed"}')
        whole = served.metric('turboquant_kv_bytes{caches="kept",form="uncompressed"}')
        assert 0 < held < whole
    with InProcess(model_path) as served:
        assert text_of(served.complete(questions[1])) == firsts[1]
        assert served.metric(hits) == 1


@pytest.fixture
def disk(tmp_path):
    mlx_turboquant_plugin.enable()
    return lambda size=10**9: DiskCache(tmp_path, size, lambda model: "name", Counts())


def kept(disk, *lengths, tokens=TOKENS):
    """Have caches written."""
    for length in lengths:
        caches = filled(length, tokens)
        disk.keep("model", tokens[:length], caches, sum(cache.nbytes for cache in caches))
    disk.wait_until(lambda: False)


def test_the_disk_has_the_longest_beginning_and_keeps_no_shorter_one(disk, tmp_path):
    cache = disk()
    kept(cache, 100, 300, 500)
    assert (tmp_path / "name").stat().st_mode & 0o777 == 0o700
    # Too short for codes, or a beginning of the last.
    assert len(list(cache.files())) == 1
    caches, count = cache.fetch("model", [*TOKENS[:500], 7], 0)
    assert count == 500
    for one, other in zip(caches, filled(500)):
        assert mx.array_equal(one.keys, other.keys)
        assert all(map(mx.array_equal, one.key_codes, other.key_codes))
    caches, count = cache.fetch("model", TOKENS[:500], 0)
    assert (count, caches[0].offset) == (499, 499)
    caches, count = cache.fetch("model", [*TOKENS[:400], 7, 8], 0)
    assert (count, caches[0].offset) == (400, 400)
    # Before it is cut it takes more than there is room for.
    assert cache.fetch("model", [*TOKENS[:400], 7, 8], 0, room=10**5) is None
    # Not for what memory has as well, nor for a few tokens of many.
    assert cache.fetch("model", [*TOKENS[:500], 7], 499) is None
    assert cache.fetch("model", [*TOKENS[:20], 7, 8], 0) is None
    assert cache.fetch("model", [9, *TOKENS[:400]], 0) is None
    fresh = disk()
    assert fresh.fetch("model", [*TOKENS[:500], 7], 0)[1] == 500


def test_a_shorter_file_serves_where_a_longer_one_is_not_worth_reading(disk):
    cache = disk()
    kept(cache, 700, tokens=[*TOKENS[:330], *TOKENS[400:770]])
    kept(cache, 300)
    assert cache.fetch("model", [*TOKENS[:330], 7, 7], 250)[1] == 300
    assert cache.fetch("model", [*TOKENS[:330], 7, 7], 0)[1] == 330


def test_damaged_and_foreign_files_are_ignored(disk, tmp_path, caplog):
    kept(disk(), 400)
    [path] = tmp_path.glob("name/*.safetensors")
    whole = path.read_bytes()
    foreign = tmp_path / "name" / "other.safetensors"
    mx.save_safetensors(str(foreign), {"x": mx.ones(3)})
    (tmp_path / "name" / f"{'0' * 32}-00000000.safetensors").write_bytes(whole[:50])
    cache = disk()
    with caplog.at_level(logging.WARNING):
        assert cache.fetch("model", [*TOKENS[:400], 7], 0)[1] == 400
        cache.fetch("model", [*TOKENS[:400], 7], 0)
    [line] = caplog.messages
    assert "2 files" in line and "ignored" in line and foreign.exists()
    caplog.clear()
    damaged = bytearray(whole)
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert cache.fetch("model", [*TOKENS[:400], 7], 0) is None
        assert cache.fetch("model", [*TOKENS[:400], 7], 0) is None
    [line] = caplog.messages
    assert "damaged" in line and not path.exists()
    # A file that another server has removed is just not there.
    caplog.clear()
    kept(cache, 400)
    path.unlink()
    assert cache.fetch("model", [*TOKENS[:400], 7], 0) is None
    assert not caplog.messages and not cache._index("name")._files


def test_the_disk_cache_stays_within_its_size(disk, tmp_path):
    kept(disk(), 300)
    [(_, size)] = disk().files()
    cache = disk(int(2.5 * size))
    kept(cache, 300, tokens=TOKENS[100:])
    # The one that was used last stays.
    assert cache.fetch("model", [*TOKENS[:300], 7], 0)[1] == 300
    kept(cache, 300, tokens=TOKENS[200:])
    assert len(list(cache.files())) == 2
    assert cache.fetch("model", [*TOKENS[:300], 7], 0)[1] == 300
    assert cache.fetch("model", TOKENS[100:500], 0) is None
    # What is larger than all of it is not written.
    kept(disk(size // 2), 300, tokens=TOKENS[300:])
    assert len(list(cache.files())) == 2
    # The index has what the folder has.
    index = cache._index("name")
    known = [bool(index.beginnings(TOKENS[first : first + 300])) for first in (0, 100, 200)]
    assert known == [True, False, True]
    assert set(index._files) == {path for path, _ in cache.files()}
    assert {path.stat().st_mode & 0o777 for path, _ in cache.files()} == {0o600}


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
import test_serving as t
cache = t.DiskCache(t.disk_files.Path(sys.argv[1]), 10**9, lambda model: "name", t.Counts())
t.mlx_turboquant_plugin.enable()
t.kept(cache, 300)
t.disk_files._checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)
t.kept(cache, 300, tokens=t.TOKENS[100:])
"""


def test_a_killed_writer_leaves_what_was_whole_and_nothing_else(disk, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environ(PYTHONPATH=str(ROOT)))
    assert done.returncode == -signal.SIGKILL
    [part] = tmp_path.glob("name/*.part.safetensors")
    busy = part.with_name("busy.part.safetensors")
    with open(busy, "wb") as held:
        disk_files.fcntl.flock(held, disk_files.fcntl.LOCK_EX)
        cache = disk()
        # What another server is writing stays.
        assert list(tmp_path.glob("name/*.part*")) == [busy]
    assert cache.fetch("model", [*TOKENS[:300], 7], 0)[1] == 300
    assert cache.fetch("model", TOKENS[100:401], 0) is None


def test_a_full_disk_costs_a_line_of_the_log(disk, tmp_path, caplog):
    cache = disk()
    (tmp_path / "name").write_text("in the way")
    kept(cache, 300)
    kept(cache, 300)
    [line] = caplog.messages
    assert "not kept on disk" in line and cache.pending == 0
    assert not list(cache.files())


def test_the_name_of_a_model_is_that_of_its_weights_and_settings():
    mlx_turboquant_plugin.enable()
    name = name_of(MODEL, None)
    assert name == name_of(MODEL)
    assert name != name_of(tiny.load("tiny-qwen2")[0]) != name_of(MODEL, MODEL)
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(kernel="eager", memory_budget="1GB")
    assert name_of(MODEL) == name
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(value_bits=3)
    assert name_of(MODEL) != name


@pytest.mark.parametrize(
    "name, change",
    [("llama", {"rms_norm_eps": 1e-3}), ("gemma3_text", {"sliding_window": 128})],
)
def test_the_name_of_a_model_is_that_of_its_configuration_too(name, change):
    """The weights are the same."""
    mlx_turboquant_plugin.enable()
    models = tiny_models.build(name), tiny_models.build(name, **change)
    models[1].load_weights(tree_flatten(models[0].parameters()))
    assert name_of(models[0]) != name_of(models[1])


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


def test_without_settings_the_server_batches_as_ever(model_path, monkeypatch):
    mlx_turboquant_plugin.enable()
    with InProcess(model_path) as served:
        text_of(served.complete("A question"))
        assert type(served.generator.turboquant._generator()) is BatchGenerator
        assert 'turboquant_kernel{kernel="' in served.ask("GET", "/metrics?x=1")[1]
        assert served.ask("GET", "/nothing")[0] == 404
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        status, text = served.ask("GET", "/metrics")
        assert status == 501 and "pip install 'mlx-turboquant-plugin[server]'" in text
        # A server that goes on without compression is mlx-lm's own.
        mlx_turboquant_plugin.disable()
        assert served.ask("GET", "/metrics")[0] == 404
        text_of(served.complete("Another question"))


def test_a_server_that_has_stopped_holds_nothing(model_path):
    mlx_turboquant_plugin.enable(memory_budget="1GB")
    with InProcess(model_path) as served:
        served.complete(TEXT[:600])
        model = weakref.ref(served.generator.model_provider.model)
        assert model() is not None
    gc.collect()
    assert model() is None


def test_the_prompt_cache_of_another_program_is_left_alone(model_path, caplog):
    class Own(LRUPromptCache):
        pass

    mlx_turboquant_plugin.enable(memory_budget="1%")
    with InProcess(model_path, Own) as served:
        assert type(served.generator.prompt_cache) is Own
        text_of(served.complete("A question"))
        assert served.ask("GET", "/metrics")[0] == 404
    [line] = caplog.messages
    assert "prompt cache that is a Own, the settings memory_budget" in line


def test_the_server_that_python_m_runs(model_path, tmp_path):
    settings = {"TURBOQUANT": "1", "TURBOQUANT_MEMORY_BUDGET": "1MB"}
    with Server(model_path, tmp_path / "log", **settings) as server:
        assert server.get("/metrics")[0] == 200
        assert server.complete(TEXT)[0] == 413
        assert server.complete("Once")[0] == 200


def test_a_share_of_the_memory(monkeypatch):
    from mlx_turboquant_plugin.serving import memory

    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(mx, "device_info", lambda device: {})
    assert memory.budget_of("50%") == machine // 2
    monkeypatch.setattr(mx, "device_info", lambda device: {"memory_size": 1000})
    assert memory.budget_of("25 %") == 250
    assert memory.budget_of("1.5GB") == 1_500_000_000

"""Prompt caches on disk."""

import logging
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
import tiny
import tiny_models
from mlx.utils import tree_flatten
from processes import ROOT, clean_environ
from served_model import (  # noqa: F401
    MODEL,
    TOKENS,
    InProcess,
    filled,
    model_path,
    prompts,
    text_of,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin.serving import disk_files
from mlx_turboquant_plugin.serving.counts import Counts
from mlx_turboquant_plugin.serving.disk_cache import DiskCache
from mlx_turboquant_plugin.serving.model_name import name_of


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
import test_serving_disk as t
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

"""mlx-lm with the diffs of patches/: the plugin patches nothing and computes the same."""

import json
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from processes import ROOT, clean_environ, run_python

from mlx_turboquant_plugin.compatibility import installed_version

VERSION = "0.32.2"
MODELS = ("tiny-qwen3", "tiny-qwen2")
WORKER = ROOT / "tests" / "hooked_worker.py"
DIFFS = sorted((ROOT / "patches").glob("*.patch"))

pytestmark = [
    pytest.mark.skipif(
        installed_version("mlx-lm") != VERSION, reason=f"the diffs are for mlx-lm {VERSION}"
    ),
    pytest.mark.skipif(
        not (shutil.which("git") or shutil.which("patch")), reason="needs git or patch"
    ),
]


@pytest.fixture(scope="module")
def hooked(tmp_path_factory):
    """A folder with a copy of the installed mlx-lm that has all diffs."""
    folder = tmp_path_factory.mktemp("hooked")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(mlx_lm.__file__).parent, folder / "mlx_lm", ignore=ignore)
    assert len(DIFFS) == 4
    for diff in DIFFS:
        apply(diff, folder)
    return folder


def apply(diff, folder):
    command = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-s", "-i"]
    # Not as a part of a repository around the folder.
    environ = clean_environ(GIT_CEILING_DIRECTORIES=str(folder.parent))
    subprocess.run([*command, str(diff)], cwd=folder, env=environ, check=True)


def work(out, path=(), models=MODELS, **variables):
    """(report, logits by name) of a process of its own."""
    done = run_python(WORKER, *models, out, path=[*path, ROOT / "tests"], **variables)
    return json.loads(done.stdout), mx.load(str(out))


def same(first, second):
    return first.keys() == second.keys() and all(
        mx.array_equal(first[name], second[name]).item() for name in first
    )


def test_hooks_and_monkeypatches_give_the_same_bits(hooked, tmp_path):
    patched, expected = work(tmp_path / "patched.npz", TURBOQUANT="1")
    report, logits = work(tmp_path / "hooked.npz", path=[hooked], TURBOQUANT="1")
    assert report["mlx_lm"] == str(hooked / "mlx_lm") != patched["mlx_lm"]
    assert report["patched"] == [] != patched["patched"]
    assert report["models"] == patched["models"] and len(report["models"]) == len(MODELS)
    assert (
        report["caches"]
        == patched["caches"]
        == [
            "BatchCompressedKVCache",
            "CompressedKVCache",
            "RotatingCompressedKVCache",
        ]
    )
    assert len(logits) == 7 * len(MODELS)
    assert same(logits, expected)


def test_without_the_plugin_the_diffs_change_nothing(hooked, tmp_path):
    report, logits = work(tmp_path / "hooked.npz", path=[hooked], models=MODELS[:1])
    _, expected = work(tmp_path / "stock.npz", models=MODELS[:1])
    assert report["mlx_lm"] == str(hooked / "mlx_lm")
    assert report["caches"] == ["BatchKVCache", "KVCache", "RotatingKVCache"]
    assert same(logits, expected)


OFF_AGAIN = """
import mlx_turboquant_plugin as plugin, tiny
from mlx_lm.models.cache import make_prompt_cache
model, _ = tiny.load("tiny-qwen3")
for switch in (plugin.enable, plugin.disable, plugin.enable):
    switch()
    print(type(make_prompt_cache(model)[0]).__name__, plugin.status().patched)
"""


def test_off_and_on_again(hooked):
    done = run_python("-c", OFF_AGAIN, path=[hooked, ROOT / "tests"])
    names = ["CompressedKVCache", "KVCache", "CompressedKVCache"]
    assert done.stdout.splitlines() == [f"{name} []" for name in names]

"""Two processes with a part of the model each give the tokens that one process gives."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker
import mlx.core as mx
import pytest
import tiny
from processes import ROOT, clean_environ

import mlx_turboquant_plugin

RANKS = 2
LAUNCH = Path(sys.executable).with_name("mlx.launch")
SECONDS = 120

pytestmark = [
    pytest.mark.skipif(
        not mx.distributed.is_available("ring"), reason="mlx was built without its ring backend"
    ),
    pytest.mark.skipif(not LAUNCH.exists(), reason="there is no mlx.launch beside this Python"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that can be split both ways, with the index that pipelines are loaded by."""
    path = shutil.copytree(tiny.PATHS["tiny-qwen2"], tmp_path_factory.mktemp("model") / "qwen2")
    weights = mx.load(str(path / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def alone():
    model, tokenizer = tiny.load("tiny-qwen2")
    mlx_turboquant_plugin.enable()
    report = distributed_worker.generate(model, tokenizer)
    mlx_turboquant_plugin.disable()
    return report


def launch(*arguments):
    """Run the worker on the ranks; returns the report of each."""
    # mlx.launch reads its input all the time once that has ended: keep it open.
    reading, writing = os.pipe()
    command = [LAUNCH, "--backend", "ring", "-n", str(RANKS), "-p", str(_free_port())]
    process = subprocess.Popen(
        [*command, "--", sys.executable, distributed_worker.__file__, *arguments],
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environ(TURBOQUANT="1", PYTHONPATH=str(ROOT)),
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:  # ranks that wait for each other
            os.killpg(process.pid, signal.SIGKILL)
        os.close(reading)
        os.close(writing)
    assert process.returncode == 0 and out, out + errors
    reports = sorted(map(json.loads, out.splitlines()), key=lambda report: report["rank"])
    assert [report["ranks"] for report in reports] == [RANKS] * RANKS, errors
    return reports


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tensor_parallel(folder, alone):
    for report in launch("tensor", folder):
        assert report["caches"] == alone["caches"] == ["CompressedKVCache"] * 4
        assert RANKS * report["heads"] == alone["heads"]
        _check(report, alone, 5e-3)


def test_pipeline(folder, alone):
    for report in launch("pipeline", folder):
        assert RANKS * report["caches"] == alone["caches"]
        assert report["heads"] == alone["heads"]
        _check(report, alone, 1e-5)


def _check(report, alone, error):
    assert report["tokens"] == alone["tokens"]
    assert report["batch"] == alone["batch"]
    # Rounding can tip a code at a threshold.
    assert report["logprobs"] == pytest.approx(alone["logprobs"], abs=error)
    assert RANKS * report["kv_bytes"] == alone["kv_bytes"]

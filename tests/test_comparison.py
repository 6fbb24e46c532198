"""The command ``mlx_turboquant compare`` on models, texts and runs out of the ordinary."""

import json
import re
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.utils import save_model

from mlx_turboquant_plugin.cli import INTERRUPTED, main
from mlx_turboquant_plugin.tools import comparison


def test_what_holds_no_codes_has_no_worst_tokens(capsys):
    arguments = ["--windows", "1", "--length", "64", "--presets", "small", "--beside"]
    model = ["compare", "--model", str(tiny.PATHS["tiny-llama"]), "--text", str(tiny.TEXT)]
    assert main([*model, *arguments, "--generate", "0"]) == 0
    assert "largest KL" not in capsys.readouterr().out


def test_a_cache_in_float32_is_compared_with_bfloat16_too(tmp_path, capsys):
    folder = shutil.copytree(tiny.PATHS["tiny-llama"], tmp_path / "fp32")
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    save_model(folder, model)
    arguments = ["--windows", "1", "--length", "64", "--presets", "small", "--beside"]
    assert main(["compare", "--model", str(folder), *arguments, "--generate", "0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^exact +32 .* 0\.50x +0\.50x +0\.50x$", out, re.MULTILINE)


def test_generations_before_ctrl_c_are_kept(monkeypatch, tmp_path, capsys):
    made, generate = [], comparison.generate

    def third_fails(arm, *args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arm.name)
        return generate(arm, *args)

    monkeypatch.setattr(comparison, "generate", third_fails)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    arguments = ["--windows", "1", "--length", "64", "--presets", "small", "default", "--beside"]
    model = ["compare", "--model", str(tiny.PATHS["tiny-llama"]), "--text", str(tiny.TEXT)]
    assert main([*model, *arguments, "--generate", "3", *files]) == INTERRUPTED
    out = capsys.readouterr().out
    assert "greedy generation of 3 tokens after 32" in out
    assert "interrupted: not measured: the generation of default" in out
    found = json.loads((tmp_path / "r.json").read_text())
    assert [bool(r["free"]) for r in (found["exact"], *found["results"])] == [True, True, False]
    assert "<summary>small" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "ids, named", [([], "which is empty"), (range(5000, 5300), "gives ids from 5000 to 5239, but")]
)
def test_tokens_of_no_use(ids, named, tmp_path, caplog):
    file = str(tmp_path / "ids.npy")
    np.save(file, np.array(ids, dtype=int))
    arguments = ["--tokens", file, "--windows", "1", "--length", "240"]
    assert main(["compare", "--model", str(tiny.PATHS["tiny-llama"]), *arguments]) == 2
    assert "--tokens " in caplog.text and repr(file) in caplog.text and named in caplog.text


def test_an_arm_that_gives_nan_is_broken(monkeypatch, tmp_path, capsys):
    lockstep = comparison.lockstep

    def damaged(*args):
        first, *others = lockstep(*args)
        nan = np.full_like(first.nlls, np.nan)
        return [replace(first, kls=np.full_like(first.kls, np.nan), nlls=nan), *others]

    monkeypatch.setattr(comparison, "lockstep", damaged)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    arguments = ["--windows", "6", "--length", "64", "--presets", "small", "--beside", "identity"]
    model = ["compare", "--model", str(tiny.PATHS["tiny-llama"]), "--text", str(tiny.TEXT)]
    assert main([*model, *arguments, "--generate", "0", *files]) == 0
    assert re.search(r"^small +broken +logits are NaN", capsys.readouterr().out, re.MULTILINE)
    small, identity = json.loads((tmp_path / "r.json").read_text())["results"]
    assert small["summary"]["kl"] == {"estimate": None, "low": None, "high": None}
    assert identity["summary"]["kl"]["estimate"] is not None
    page = (tmp_path / "r.html").read_text()
    assert "<td>nan</td>" in page and '="nan"' not in page


def test_windows_of_one_text_are_one(tmp_path, capsys):
    ids = np.concatenate([[1], np.tile(np.arange(63) + 5, 6)])
    np.save(tmp_path / "ids.npy", ids)
    arguments = [
        "--windows",
        "6",
        "--length",
        "64",
        "--presets",
        "small",
        "--beside",
        "mlx-lm-4bit",
    ]
    model = ["compare", "--model", str(tiny.PATHS["tiny-llama"])]
    tokens = ["--tokens", str(tmp_path / "ids.npy")]
    assert main([*model, *arguments, *tokens, "--generate", "0"]) == 0
    [said] = re.findall(r"^mlx-lm-4bit +no verdict +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert said == "only 1 of 6 windows differ: choose a text that does not repeat"

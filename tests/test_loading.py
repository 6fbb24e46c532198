"""Models that can't be loaded, and what is known of those that can."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_turboquant_plugin.cli import BAD_SETTINGS, main
from mlx_turboquant_plugin.tools.loading import SHOWN_CHARACTERS, Loaded, context, why

WEIGHTS = "model.safetensors"


def truncated(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:5000])


def with_few(folder):
    weights = mx.load(str(folder / WEIGHTS))
    kept = {name: weights[name] + 0 for name in sorted(weights)[:3]}
    mx.eval(kept)
    mx.save_safetensors(str(folder / WEIGHTS), kept, metadata={"format": "mlx"})


def of_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))


DAMAGES = {
    "truncated": (truncated, "its weights are damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "its weights are damaged"),
    "random": (
        lambda folder: (folder / WEIGHTS).write_bytes(np.random.default_rng(0).bytes(9999)),
        "its weights are damaged",
    ),
    "few": (with_few, "Missing 35 parameters): its weights are damaged"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "correct its config.json"),
    "half": (lambda folder: (folder / "config.json").write_text("{"), "correct its config.json"),
    "type": (of_type, "choose a model of a type that this mlx-lm has"),
}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(tiny.PATHS["tiny-llama"], tmp_path / "model")


@pytest.mark.parametrize("command", ["compare", "drift", "truncate", "demo", "bench", "estimate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_one_line(command, damage, copy, caplog):
    do, advice = DAMAGES[damage]
    do(copy)
    memory = ["--memory", "1GB"] if command == "estimate" else []
    assert main([command, "--model", str(copy), *memory]) == BAD_SETTINGS
    [record] = caplog.records
    assert len(record.getMessage().splitlines()) == 1
    assert f"--model is {str(copy)!r}, " in record.getMessage() and advice in record.getMessage()


def test_reasons_are_short():
    assert why(ValueError("one:\nand two")) == "one"
    assert why(KeyError("name")) == "KeyError: 'name'" and why(TypeError()) == "TypeError"
    assert len(why(OSError("x" * 1000))) < SHOWN_CHARACTERS + 10


def without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def test_a_model_without_a_tokenizer(copy, tmp_path, caplog, capsys):
    without_tokenizer(copy)
    compare = ["compare", "--model", str(copy), "--windows", "1", "--length", "240"]
    assert main(compare) == BAD_SETTINGS
    assert "whose tokenizer can't be loaded" in caplog.text and "--tokens FILE" in caplog.text
    np.save(tmp_path / "ids.npy", np.arange(300))
    compare += ["--tokens", str(tmp_path / "ids.npy"), "--presets", "small", "--beside"]
    assert main([*compare, "--generate", "2"]) == 0
    assert "small" in capsys.readouterr().out
    assert main([*compare, "--tasks", "1"]) == BAD_SETTINGS
    arguments = ["--parts", "prefill", "--prompts", "40", "--rounds", "1"]
    assert main(["bench", "--model", str(copy), *arguments]) == 0


def test_contexts():
    assert context({}) is None and context({"max_position_embeddings": 8}) == 8
    assert context({"text_config": {"max_position_embeddings": 9}}) == 9
    scaling = {"factor": 4.0, "original_max_position_embeddings": 100}
    assert context({"max_position_embeddings": 100, "rope_scaling": scaling}) == 400
    loaded = Loaded(None, None, {"max_position_embeddings": 8})
    assert loaded.beyond_context(8, "--length has") == []
    [line] = loaded.beyond_context(9, "--length has")
    assert line.startswith("--length has 9 tokens, more than the 8 that")
    assert Loaded(None, None, {}).beyond_context(10**9, "") == []


@pytest.fixture
def short(copy):
    """A model that is made for 200 tokens."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200}))
    return copy


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--windows", "1", "--presets", "small", "--beside", "--generate", "150"],
        ["drift"],
        ["truncate", "--at", "9", "--remove", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_windows_beyond_the_context_are_noted(arguments, short, tmp_path, capsys):
    file = tmp_path / "found.json"
    arguments = [*arguments, "--model", str(short), "--text", str(tiny.TEXT), "--length", "350"]
    assert main([*arguments, "--json", str(file)]) == 0
    note = "--length has 350 tokens, more than the 200 that the model is made for"
    assert note in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert any(line.startswith(note) for line in found["notes"])
    # What is generated stays within.
    assert found.get("prompt", 50) == 50


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--generate", "200"], "--generate is 200, and the model is made for 200 tokens"),
        (["--tasks", "1", "--task-lengths", "150", "201"], "--task-lengths has 201, and the"),
    ],
)
def test_what_is_asked_for_beyond_the_context_is_refused(arguments, named, short, caplog):
    assert main(["compare", "--model", str(short), "--length", "64", *arguments]) == BAD_SETTINGS
    assert named in caplog.text


@pytest.mark.parametrize("command", ["compare", "drift", "truncate", "demo"])
def test_an_exact_run_that_gives_nan(command, copy, caplog):
    weights = mx.load(str(copy / WEIGHTS))
    damaged = {k: v * (mx.nan if "layers.1.mlp" in k else 1) for k, v in weights.items()}
    mx.eval(damaged)
    mx.save_safetensors(str(copy / WEIGHTS), damaged, metadata={"format": "mlx"})
    sizes = {"demo": ["--max-tokens", "1", "--prompt", "Once"], "truncate": ["--length", "400"]}
    arguments = sizes.get(command, ["--length", "240"])
    assert main([command, "--model", str(copy), *arguments]) == BAD_SETTINGS
    assert "the uncompressed run gives NaN at token 0" in caplog.text

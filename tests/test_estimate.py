"""``mlx_turboquant estimate``: its figures are those of caches that models have filled."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import tiny
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache
from mlx_lm.utils import quantize_model, save_config, save_model

from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.cache.sizes import cache_size
from mlx_turboquant_plugin.codecs.key_bias import BLOCK
from mlx_turboquant_plugin.integration.calibration import statistics_for
from mlx_turboquant_plugin.integration.family import layers_of
from mlx_turboquant_plugin.rules import SettingsError
from mlx_turboquant_plugin.tools import memory
from mlx_turboquant_plugin.tools.arms import EXACT, PRESET_ARMS
from mlx_turboquant_plugin.tools.estimate import LENGTHS as SHOWN
from mlx_turboquant_plugin.tools.estimate import Estimate, estimate
from mlx_turboquant_plugin.tools.runs import compressed, prompt_cache, table_bytes
from mlx_turboquant_plugin.tools.weightless import INDEX, model_of, weight_bytes

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
# A prompt, and some steps of decoding.
LENGTHS = (557, 560)
CHUNK = 256


def folder(path, **config):
    """A folder with a configuration alone."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def tiny_folder(path, name, **special):
    """That of a tiny model with 2 layers of this architecture."""
    config = {**tiny_models.COMMON, **tiny_models.SPECIAL.get(name, {}), "model_type": name}
    return folder(path, **{**config, "torch_dtype": "float32", **special})


def lengthen(model, caches, length):
    """Have empty caches read a prompt of so many tokens, and filled ones go step by step."""
    tokens = (mx.arange(length) % 50)[None]
    start = max(cache.size() for cache in caches)
    pieces = [*range(0, length - 1, CHUNK), *range(length - 1, length + 1)]
    if start:
        pieces = range(start, length + 1)
    for first, last in itertools.pairwise(pieces):
        model(tokens[:, first:last], cache=caches)
        mx.eval([cache.state for cache in caches])


# Sliding windows, a state beside attention, keys that are put together of parts.
@pytest.mark.parametrize("name", ["gemma3_text", "falcon_h1", "minicpm3"])
def test_bytes_are_those_of_filled_caches(name, tmp_path):
    model = tiny_models.build(name)
    found, outcome = estimate(model_of(tiny_folder(tmp_path / name, name))[0], 10**9)
    assert [one.name for one in found] == ["uncompressed", *PRESET_ARMS]
    assert "layers compressed" in outcome
    for one in found:
        arm = PRESET_ARMS.get(one.name, EXACT)
        with compressed(**arm.settings) if arm.settings else arm.on():
            caches = make_prompt_cache(model)
            for length in LENGTHS:
                lengthen(model, caches, length)
                assert one.at(length) == sum(cache.nbytes for cache in caches), one.name


def test_a_cache_of_chunks_forgets():
    """Llama 4's, in which no more than a chunk of each prompt's is kept."""
    keys = mx.zeros((1, 2, 1, 32))
    used, cache = ChunkedKVCache(64), ChunkedKVCache(64)
    used.update_and_fetch(keys, keys)
    for _ in range(300):
        cache.maybe_trim_front()
        cache.update_and_fetch(keys, keys)
    assert cache_size(ChunkedKVCache(64), used, ()).at(300) == cache.nbytes


def test_tables_are_those_that_a_model_makes(tmp_path):
    model = tiny_models.build("qwen3")
    found, _ = estimate(model_of(tiny_folder(tmp_path / "qwen3", "qwen3"))[0], 10**9)
    with compressed(preset="default"):
        caches = make_prompt_cache(model)
        lengthen(model, caches, LENGTHS[0])
        tables = table_bytes(caches)
        statistics = [x for layer in layers_of(model) for x in statistics_for(layer.self_attn)[1]]
    # The rotary table is counted as long as for the longest context that is shown.
    shared = next(one.shared for one in found if one.name == "default")
    rotary = caches[0].codec.bias.table
    grown = shared - tables - sum(x.nbytes for x in statistics)
    assert grown == SHOWN[-1] // BLOCK * rotary.dims * 4 - sum(x.nbytes for x in rotary.coarse)


@pytest.mark.skipif(not SHARED.exists(), reason="the zoo of models is not here")
@pytest.mark.parametrize("name", ["qwen3-zoo", "llama-zoo"])
def test_bytes_of_long_contexts(name):
    path = str(SHARED / name)
    model, lengths = mlx_lm.load(path)[0], (1024, 8192)
    exact = prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=exact)
    shapes = memory.layer_shapes(exact)
    for one in estimate(model_of(path)[0], 10**9)[0]:
        arm = PRESET_ARMS.get(one.name, EXACT)
        true = memory.bytes_by_length(arm, model, shapes, exact[0].keys.dtype, lengths)
        assert [one.at(length) for length in lengths] == pytest.approx(true, rel=0.02)


def run(capsys, path, memory="1GB"):
    assert cli.main(["estimate", "--model", str(path), "--memory", memory]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_configuration_alone_will_do(tmp_path, capsys):
    original = tiny.PATHS["tiny-qwen3"]
    (tmp_path / "alone").mkdir()
    shutil.copy(original / "config.json", tmp_path / "alone")
    first, _, outcome, *alone = run(capsys, tmp_path / "alone")
    with_weights, _, _, *others = run(capsys, original)
    assert "4 of 4 layers compressed" in outcome and alone == others
    assert [line.split(" weights ")[1] for line in (first, with_weights)] == [
        "3.81 MB, as config.json describes them", "3.81 MB, as they are in the folder",
    ]  # fmt: skip
    assert any(line.startswith("default") and "x)" in line for line in alone)


def test_quantized_weights(tmp_path):
    model, _, config = mlx_lm.load(str(tiny.PATHS["tiny-llama"]), return_config=True)
    model, config = quantize_model(model, config, 64, 4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    there = weight_bytes(str(tmp_path), *model_of(str(tmp_path))[::2])
    assert there == sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    for file in tmp_path.glob("model*"):
        file.unlink()
    assert weight_bytes(str(tmp_path), *model_of(str(tmp_path))[::2]) == there
    (tmp_path / INDEX).write_text('{"metadata": {"total_size": 12345}}')
    assert weight_bytes(str(tmp_path), *model_of(str(tmp_path))[::2]) == 12345


def test_what_fits():
    one = Estimate("linear", lambda count: 1000 + 10 * count, shared=500, room=101_500)
    assert (one.per_token, one.fixed) == (10, 1500)
    assert one.longest == 10_000 and one.at(10_001) + one.shared > one.room
    assert one.chats == 101_000 // (1000 + 10 * 8192)
    assert replace(one, room=-5).longest == replace(one, room=-5).chats == 0


def test_a_model_that_runs_uncompressed_says_so(tmp_path, capsys):
    lines = run(capsys, tiny_folder(tmp_path / "x", "mamba"))
    assert any("runs uncompressed: it has no keys and values" in line for line in lines)
    rows = [line.split()[0] for line in lines if line.startswith(("uncompressed ", *PRESET_ARMS))]
    assert rows == ["uncompressed"]


def test_an_opt_out_by_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TURBOQUANT_OPT_OUT", "*/left-out")
    lines = run(capsys, tiny_folder(tmp_path / "left-out", "qwen3"))
    assert any("runs uncompressed: opt_out pattern '*/left-out'" in line for line in lines)


def test_weights_that_do_not_fit(tmp_path, capsys):
    lines = run(capsys, tiny.PATHS["tiny-qwen3"], "1MB")
    assert lines[-1] == "the weights alone are larger than 1.00 MB"


@pytest.mark.parametrize(
    "config, problem",
    [
        (None, "which has no config.json: name a folder"),
        ({"model_type": "nonsense"}, "Model type nonsense not supported"),
        ({}, "KeyError: 'model_type'"),
        ({"model_type": "llama"}, "TypeError.*missing"),
    ],
)
def test_folders_that_hold_no_model(config, problem, tmp_path):
    path = str(tmp_path) if config is None else folder(tmp_path / "x", **config)
    with pytest.raises(SettingsError, match=problem):
        model_of(path)


@pytest.mark.parametrize("memory", ["16", "GB", "0GB", "-1GB", "16 bananas", "1e3GB"])
def test_memory_that_is_no_size(memory, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["estimate", "--model", "x", f"--memory={memory}"])
    assert stopped.value.code == cli.BAD_SETTINGS
    problem = f"{memory!r} is not a size of at least 1000 bytes, such as 6GB, 500MiB"
    assert problem in capsys.readouterr().err

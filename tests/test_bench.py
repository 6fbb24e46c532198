"""``mlx_turboquant bench``: what it measures, what it says, and what it refuses."""

import json
import sys

import matplotlib.image
import pytest
import tiny
from mlx_lm.models import qwen3
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

import mlx_turboquant_plugin
from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.attention import fused
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache
from mlx_turboquant_plugin.evaluation.bench import measurement, model
from mlx_turboquant_plugin.evaluation.bench.measurement import Results, Timing, take_turns
from mlx_turboquant_plugin.evaluation.bench.model import ModelBench
from mlx_turboquant_plugin.evaluation.runs import compressed, compressed_prompt_cache, table_bytes
from mlx_turboquant_plugin.kernels import fused_kernels

SMALL = ["--rounds", "1", "--layers", "1", "--heads", "4", "2", "--head-dim", "64"]
KINDS = {
    "KVCache": KVCache,
    "BatchKVCache": BatchKVCache,
    "QuantizedKVCache": QuantizedKVCache,
    "compressed": CompressedKVCache,
}


def run(*arguments):
    return cli.main(["bench", *SMALL, *map(str, arguments)])


@pytest.fixture
def measure(tmp_path):
    """Run the command; returns its JSON and {(part, tokens, batch, dtype, cache): figures}."""

    def measure(*arguments):
        file = tmp_path / "bench.json"
        assert run(*arguments, "--json", file) == 0
        report = json.loads(file.read_text())
        rows = {
            (m["part"], m["tokens"], m["batch"], m["dtype"], m["cache"]): m
            for m in report["measurements"]
        }
        assert len(rows) == len(report["measurements"])
        return report, rows

    return measure


def test_every_part_with_table_json_and_plot(measure, tmp_path, capsys):
    plot = tmp_path / "bench.png"
    report, rows = measure(
        "--lengths", 300, 600, "--batch", 1, 2, "--prompts", 400, "--chunk", 128,
        "--dtypes", "float32", "--model-dtype", "float32", "--plot", plot,
    )  # fmt: skip
    singles = {"KVCache", "QuantizedKVCache", "compressed"}
    for tokens in (300, 600):
        for part, batch, kinds in (
            ("call", 1, singles),
            ("call", 2, {*singles, "BatchKVCache"}),
            ("decode", 1, singles),
            ("decode", 2, {"BatchKVCache", "compressed"}),
        ):
            found = {row[-1] for row in rows if row[:4] == (part, tokens, batch, "float32")}
            assert found == kinds
    assert {row[-1] for row in rows if row[0] == "prefill"} == singles
    assert report["skipped"] == [] and report["notes"]["fallbacks"] == []
    for row in rows.values():
        seconds = row["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert (row["peak_bytes"] or row["cache_bytes"]) >= row["cache_bytes"] > 0
    assert len(matplotlib.image.imread(plot)) > 500
    out, err = capsys.readouterr()
    table = [line.split() for line in out.splitlines()]
    assert sum("compressed" in line[:4] for line in table) == 9
    assert "not measured" not in out
    # No terminal, no progress bar.
    assert "turn" not in err


def test_bytes_are_those_of_every_array(measure):
    tokens = 1000
    _, rows = measure(
        "--parts", "decode", "--lengths", tokens, "--batch", 1, 3, "--model-dtype", "bfloat16"
    )
    stock = rows["decode", tokens, 1, "bfloat16", "KVCache"]["cache_bytes"]
    # Four layers of 2 KV heads of 128, room for 256 tokens at a time.
    per_token = 4 * 2 * 2 * 128 * 2
    assert stock == 1280 * per_token
    # Twice 33 tokens are decoded: one turn, and one before to warm up. The newest, 1065, reads
    # those before 864 as codes, and after a trim of 16 those before 832.
    length, coded, exact_from = tokens + 66, 864, 832
    codes = 4 * 2 * coded * (128 * 4 // 8 + 1 + 128 * 3 // 8 + 1)
    exact = (4 + length - exact_from) * per_token
    tables = 128 * 4 + 4 * (2 * 128 * 4)
    ours = rows["decode", tokens, 1, "bfloat16", "compressed"]["cache_bytes"]
    assert ours == codes + exact + tables
    # The exact keys and values that it was filled with are gone.
    assert rows["decode", tokens, 1, "bfloat16", "compressed"]["peak_bytes"] < stock
    batch = rows["decode", tokens, 3, "bfloat16", "compressed"]["cache_bytes"]
    assert batch >= 3 * codes + 3 * (4 + 192) * per_token + tables


def test_tables_are_counted_once():
    loaded, _ = tiny.load("tiny-qwen2")
    with compressed():
        caches = compressed_prompt_cache(loaded)
    codecs = [cache.codec for cache in caches]
    rotary = codecs[0].bias.table
    assert all(codec.bias.table is rotary for codec in codecs)
    shared = sum(array.nbytes for array in rotary.arrays) + codecs[0].key_rotation.array.nbytes
    own = sum(x.nbytes for codec in codecs for x in (codec.balance, *codec.bias.arrays))
    assert table_bytes(caches) == shared + own
    assert table_bytes([KVCache()]) == 0


def test_each_cache_is_what_it_is_called(monkeypatch):
    """Also where TURBOQUANT=1 has patched mlx_lm before."""
    monkeypatch.setenv("TURBOQUANT", "1")
    loaded, _ = tiny.load("tiny-qwen3")
    seen = []
    plain = model.ModelBench._decode

    def decode(bench, kind, caches, batch):
        seconds = plain(bench, kind, caches, batch)
        with bench._patched(kind):
            patched = qwen3.scaled_dot_product_attention is not scaled_dot_product_attention
        seen.append((kind, {type(cache) for cache in caches}, patched))
        return seconds

    monkeypatch.setattr(model.ModelBench, "_decode", decode)
    bench = ModelBench(loaded, 4, {})
    results = Results([], [])
    for batch in (1, 2):
        bench.decode(results, 300, batch, 1, lambda: None)
    for kind, types, patched in seen:
        ours = kind == "compressed"
        assert patched is ours
        if ours:
            assert types <= {CompressedKVCache, BatchCompressedKVCache}
        else:
            assert types == {KINDS[kind]}
    assert {kind for kind, _, _ in seen} == set(KINDS)
    assert not mlx_turboquant_plugin.status().active


@pytest.mark.parametrize("kernel", ["eager", "compiled", *fused_kernels()])
def test_the_kernel_that_is_asked_for_runs(kernel, measure, monkeypatch, capsys):
    monkeypatch.setenv("TURBOQUANT_KERNEL", "compiled")
    made = []
    plain = CompressedKVCache.append

    def append(cache, *args):
        made.append(cache.kernel)
        return plain(cache, *args)

    monkeypatch.setattr(CompressedKVCache, "append", append)
    report, _ = measure(
        "--parts", "layer", "decode", "--lengths", 300, "--dtypes", "float32", "--kernel", kernel
    )
    assert report["notes"]["kernel"] == kernel and set(made) == {kernel}
    assert f"kernel {kernel};" in capsys.readouterr().out


def test_what_a_kernel_leaves_to_others_is_said(monkeypatch, capsys):
    monkeypatch.setattr(fused, "_fallbacks", ["the metal kernel does not support this"])
    assert run("--parts", "layer", "--lengths", 300, "--dtypes", "float32") == 0
    assert "the metal kernel does not support this" in capsys.readouterr().out.splitlines()


MISSING = next(name for name in ("metal", "cuda") if name not in fused_kernels())


@pytest.mark.parametrize(
    "arguments, environment, said",
    [
        (["--kernel", MISSING], {}, f"'{MISSING}', which this machine can't run"),
        ([], {"TURBOQUANT_KERNEL": MISSING}, f"'{MISSING}', which this machine can't run"),
        ([], {"TURBOQUANT_BYPASS": "identity"}, "TURBOQUANT_BYPASS is 'identity'"),
        ([], {"TURBOQUANT_WINDOW": "33"}, "TURBOQUANT_WINDOW is 33"),
        (["--heads", "5", "2"], {}, "--heads is 5 2: the query heads must be a multiple"),
        (
            ["--parts", "layer"],
            {"TURBOQUANT_KEY_BITS": "4,3"},
            "key_bits (environment TURBOQUANT_KEY_BITS) is 4,3, bits by layer, and the part layer "
            "measures a layer of no model: leave it out (--parts decode prefill)",
        ),
        (["--model", "/no/such/model"], {}, "'/no/such/model', which does not exist"),
    ],
)
def test_bad_settings(arguments, environment, said, monkeypatch, caplog, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(*arguments) == cli.BAD_SETTINGS
    assert said in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lengths", "0"], "'0' is not a whole number from 1 up"),
        (["--rounds", "many"], "'many' is not a whole number"),
        (["--parts", "sleep"], "invalid choice: 'sleep'"),
        (["--kernel", "vulkan"], "invalid choice: 'vulkan'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--json", "no/such/x.json"], "'no/such/x.json' can't be written: there is no folder"),
        (["--plot", "no/such/x.png"], "'no/such/x.png' can't be written: there is no folder"),
        (["--model", "x", "--shape", "qwen3-8b"], "not allowed with argument"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == cli.BAD_SETTINGS
    assert said in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, caplog, tmp_path):
    # What find_spec() answers for a module that is not installed.
    monkeypatch.setattr("mlx_turboquant_plugin.evaluation.bench.plot.find_spec", lambda name: None)
    assert run("--plot", tmp_path / "x.png") == cli.BAD_SETTINGS
    assert "pip install 'mlx-turboquant-plugin[plot]', or leave --plot out" in caplog.text


def test_the_measurement_does_not_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--parts", "layer", "--lengths", 300, "--dtypes", "float32") == 0


def test_what_can_not_be_measured_is_said(measure, monkeypatch, capsys):
    monkeypatch.setattr(measurement, "ROOM", 0)
    report, rows = measure("--parts", "layer", "decode", "--lengths", 300, "--dtypes", "float32")
    assert rows == {} and len(report["skipped"]) == 2
    assert "not measured: decode, 300 tokens, batch 1, all: needs about" in capsys.readouterr().out


def test_quantised_caches_that_mlx_can_not_multiply_with_are_left_out(measure, monkeypatch):
    def quantized(*args, **kwargs):
        raise RuntimeError("[quantized_matmul] No implementation for problem shape")

    monkeypatch.setattr("mlx_lm.models.base.quantized_scaled_dot_product_attention", quantized)
    report, rows = measure(
        "--lengths", 300, "--prompts", 200, "--dtypes", "float32", "--model-dtype", "float32"
    )
    assert {row[0] for row in rows} == {"call", "decode", "prefill"}
    assert {row[-1] for row in rows} == {"KVCache", "compressed"}
    assert [x["cache"] for x in report["skipped"]] == ["QuantizedKVCache"] * 3
    assert all("quantized_matmul" in x["reason"] for x in report["skipped"])


def test_other_errors_are_not_hidden(measure, monkeypatch):
    def attend(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr("mlx_turboquant_plugin.evaluation.bench.layer.attend", attend)
    with pytest.raises(RuntimeError, match="broken"):
        measure("--parts", "layer", "--lengths", 300, "--dtypes", "float32")


def test_turns():
    order = []

    def arm(name, seconds):
        def turn():
            order.append(name)
            return seconds

        return turn

    ticks = []
    arms = {"KVCache": arm("a", 1.0), "QuantizedKVCache": arm("q", 20.0), "compressed": arm("b", 2.0)}
    timings = take_turns(arms, 6, lambda: ticks.append(1))
    assert "".join(order) == "aqb" + "ab" * 4 + "aqb"
    assert len(ticks) == 6
    assert timings["compressed"] == Timing(2.0, 2.0, 2.0, 2.0, 6)
    assert timings["QuantizedKVCache"].count == 2


def test_timing():
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 3.0, 1)
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 10.0]) == Timing(3.0, 2.0, 4.0, 4.0, 5)

"""``mlx_turboquant bench``: what it measures, what it says, and what it refuses."""

import json
from xml.etree import ElementTree

import mlx.core as mx
import pytest
import tiny
from bench_runs import SHORT, failing, measure, run  # noqa: F401
from mlx_lm.models import qwen3
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

import mlx_turboquant_plugin
from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.attention import dispatch, fused
from mlx_turboquant_plugin.backends import backend, fused_kernels
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache
from mlx_turboquant_plugin.tools import progress
from mlx_turboquant_plugin.tools.bench import command, measurement, model, prompts, shapes
from mlx_turboquant_plugin.tools.bench.measurement import Results
from mlx_turboquant_plugin.tools.bench.model import ModelBench
from mlx_turboquant_plugin.tools.bench.plot import PANELS
from mlx_turboquant_plugin.tools.runs import compressed, compressed_prompt_cache, table_bytes

KINDS = {
    "KVCache": KVCache,
    "BatchKVCache": BatchKVCache,
    "QuantizedKVCache": QuantizedKVCache,
    "compressed": CompressedKVCache,
}


def test_every_part_with_table_json_and_plot(measure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 3600)
    plot = tmp_path / "bench.svg"
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
    for batch, kinds in ((1, singles), (2, {"BatchKVCache", "compressed"})):
        assert {row[-1] for row in rows if row[:3] == ("prefill", 400, batch)} == kinds
    assert report["skipped"] == [] and report["notes"]["fallbacks"] == []
    for row in rows.values():
        seconds = row["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert (row["first"] or 0) > 0 if row["part"] == "prefill" else row["first"] is None
        assert (row["peak_bytes"] or row["cache_bytes"]) >= row["cache_bytes"] > 0
    charts = list(ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}svg"))[1:]
    drawn = {
        chart.get("aria-label"): [line.text for line in chart.iterfind(".//{*}polyline/{*}title")]
        for chart in charts
    }
    assert list(drawn) == [panel.title for panel in PANELS if panel.part != "chain"]
    assert drawn["decoding"] == [
        *(f"{kind}, float32, batch 1" for kind in ("KVCache", "QuantizedKVCache", "compressed")),
        *(f"{kind}, float32, batch 2" for kind in ("BatchKVCache", "compressed")),
    ]
    out, err = capsys.readouterr()
    table = [line.split() for line in out.splitlines()]
    assert sum("compressed" in line[:4] for line in table) == 10
    assert "not measured" not in out
    # No terminal, no progress bar.
    assert "turn" not in err


def test_bytes_are_those_of_every_array(measure):
    tokens = 1960
    _, rows = measure(
        "--parts", "decode", "--lengths", tokens, "--batch", 1, 3, "--model-dtype", "bfloat16"
    )
    stock = rows["decode", tokens, 1, "bfloat16", "KVCache"]["cache_bytes"]
    # Four layers of 2 KV heads of 128, room for 256 tokens at a time.
    per_token = 4 * 2 * 2 * 128 * 2
    assert stock == 2048 * per_token
    # Twice 33 tokens are decoded: one turn, and one before to warm up. The newest, 2025, reads
    # those before 1856 as codes, and after a trim of 16 those before 1824.
    length, quantized, full_from = tokens + 66, 1856, 1824
    codes = 4 * 2 * quantized * (128 * 4 // 8 + 2 + 128 * 4 // 8 + 1)
    full = (4 + length - full_from) * per_token
    with compressed():
        caches = compressed_prompt_cache(tiny.load("tiny-qwen3")[0])
        # The rotary table grows with the positions, in blocks of 128.
        caches[0].codec.bias.table.blocks(-(-length // 128))
        tables = table_bytes(caches)
    ours = rows["decode", tokens, 1, "bfloat16", "compressed"]["cache_bytes"]
    assert ours == codes + full + tables
    # The full-precision keys and values that it was filled with are gone.
    assert rows["decode", tokens, 1, "bfloat16", "compressed"]["peak_bytes"] < stock
    batch = rows["decode", tokens, 3, "bfloat16", "compressed"]["cache_bytes"]
    assert batch >= 3 * codes + 3 * (4 + 160) * per_token + tables


def test_tables_are_counted_once():
    loaded, _ = tiny.load("tiny-qwen2")
    with compressed():
        caches = compressed_prompt_cache(loaded)
        table_bytes(caches)  # Which are made now.
    codecs = [cache.codec for cache in caches]
    rotary = codecs[0].bias.table
    assert all(codec.bias.table is rotary for codec in codecs)
    rotations = codecs[0].key_rotation.array, codecs[0].value_rotation.array
    shared = sum(array.nbytes for array in (*rotary.arrays, *rotations))
    own = sum(
        x.nbytes
        for codec in codecs
        for x in (
            codec.balance,
            codec.layout,
            codec.query_squares,
            codec.feedback,
            *codec.bias.arrays,
        )
    )
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
    """Also by a model, after whose turns compression is switched off again."""
    attend = dispatch.attend_tiles

    def leaving(*args):
        dispatch.fall_back(backend("metal"), "this")
        return attend(*args)

    monkeypatch.setattr(dispatch, "attend_tiles", leaving)
    fused.fall_back(backend("metal"), "what was before")
    assert run("--parts", "decode", "--lengths", 300, "--model-dtype", "float32") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "does not support" in line]
    assert said == ["the metal kernel does not support this: the compiled one serves instead"]


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
        (["--plot", "no/such/x.svg"], "'no/such/x.svg' can't be written: there is no folder"),
        (["--model", "x", "--shape", "qwen3-8b"], "not allowed with argument"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == cli.BAD_SETTINGS
    assert said in capsys.readouterr().err


def test_what_can_not_be_measured_is_said(measure, monkeypatch, capsys):
    monkeypatch.setattr(measurement, "ROOM", 0)
    report, rows = measure("--parts", "layer", "decode", "--lengths", 300, "--dtypes", "float32")
    assert rows == {} and len(report["skipped"]) == 2
    assert "not measured: decode, 300 tokens, batch 1, all: needs about" in capsys.readouterr().out


def test_quantized_caches_that_mlx_can_not_multiply_with_are_left_out(measure, monkeypatch):
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

    monkeypatch.setattr("mlx_turboquant_plugin.tools.bench.layer.attend", attend)
    with pytest.raises(RuntimeError, match="broken"):
        measure("--parts", "layer", "--lengths", 300, "--dtypes", "float32")


def test_a_batch_of_ragged_prompts_is_processed_to_its_first_tokens(measure, monkeypatch):
    """As the server does it: rows of the lengths that are said, all of them to the end."""
    assert prompts.lengths(8192, 8) == [1024 * row for row in range(1, 9)]
    assert prompts.lengths(100, 1) == [100] and prompts.lengths(3, 4) == [1, 1, 2, 3]
    done = []
    plain = prompts.process_batch

    def process_batch(model, rows, caches, chunk):
        done.append(plain(model, rows, caches, chunk))
        return done[-1]

    monkeypatch.setattr(prompts, "process_batch", process_batch)
    _, rows = measure(*SHORT, "--batch", 3)
    for caches, kind in zip(done, (KVCache, CompressedKVCache)):
        assert {type(cache) for cache in caches} == {kind}
        # The prompts and the first token, which the second needs.
        assert sorted(cache.offset for cache in caches) == [26] * 4 + [113] * 4 + [201] * 4
    assert len(done) == 4
    for kind in ("BatchKVCache", "compressed"):
        row = rows["prefill", 200, 3, "bfloat16", kind]
        assert row["processed"] == 25 + 112 + 200 and row["seconds"]["count"] == 1


def test_the_first_prompt_counts_by_itself(measure, monkeypatch):
    """That of KVCache is the first thing that a model does in the process."""
    order = []
    for name, part in (("_prefill", "prefill"), ("_decode", "decode")):
        original = getattr(ModelBench, name)

        def spy(bench, kind, *args, plain=original, part=part):
            order.append((part, kind))
            return plain(bench, kind, *args)

        monkeypatch.setattr(ModelBench, name, spy)
    _, rows = measure("--parts", "decode", *SHORT[1:], "--lengths", 300, "--rounds", 2)
    assert order[:6] == [("prefill", "KVCache"), ("prefill", "compressed")] * 3
    assert {part for part, _ in order[6:]} == {"decode"}
    for row in rows.values():
        if row["part"] == "prefill":
            assert row["seconds"]["count"] == 2 and row["first"] > 0


def test_quantized_prompts_that_take_too_long_are_left(measure, monkeypatch):
    monkeypatch.setattr(model, "PATIENCE", 0)
    report, rows = measure(*SHORT, "--model-dtype", "float32")
    assert {row[-1] for row in rows} == {"KVCache", "compressed"}
    (skipped,) = report["skipped"]
    assert skipped["cache"] == "QuantizedKVCache" and "takes more than 0 times" in skipped["reason"]


def stopping(monkeypatch, kind, error):
    """Raise ``error`` when a prompt with a cache of ``kind`` has its second turn."""
    seen = []
    plain = ModelBench._prefill

    def prefill(bench, which, *args):
        seen.append(which)
        if which == kind and seen.count(kind) == 2:
            raise error
        return plain(bench, which, *args)

    monkeypatch.setattr(ModelBench, "_prefill", prefill)


def test_an_interrupted_run_shows_what_it_has(monkeypatch, tmp_path, capsys):
    stopping(monkeypatch, "KVCache", KeyboardInterrupt())
    files = tmp_path / "x.json", tmp_path / "x.svg"
    assert run(*SHORT, "--json", files[0], "--plot", files[1]) == 130
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "interrupted: this is what was measured until then"
    first, ours = (
        line.split() for line in out if line.split()[3:4] in (["KVCache"], ["compressed"])
    )
    # First times, and no others.
    assert first[4] != "-" and ours[4] != "-" and first[6:10] == ["-"] * 4
    measured = json.loads(files[0].read_text())["measurements"]
    assert [(m["cache"], m["seconds"]) for m in measured] == [
        ("KVCache", None),
        ("compressed", None),
    ]
    assert all(m["first"] > 0 and m["cache_bytes"] > 0 for m in measured)
    assert files[1].exists()


def test_interrupted_before_anything_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda *_: failing(1, KeyboardInterrupt())())
    assert run(*SHORT) == 130
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_was_measured_is_shown_before_our_error(monkeypatch, capsys):
    stopping(monkeypatch, "compressed", RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        run(*SHORT)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.split()[3:4] == ["KVCache"]]
    assert "-" not in line.split()


def test_caches_of_mlx_lm_that_fail_are_said(measure, monkeypatch):
    stopping(monkeypatch, "KVCache", ValueError("no"))
    report, rows = measure(*SHORT)
    assert {"cache": "KVCache", "reason": "ValueError: no"}.items() <= report["skipped"][1].items()
    assert rows["prefill", 200, 1, "bfloat16", "compressed"]["seconds"]["count"] == 1
    assert rows["prefill", 200, 1, "bfloat16", "KVCache"]["seconds"] is None


def test_quick_measures_less_of_what_is_not_given(measure, monkeypatch):
    monkeypatch.setattr(command, "QUICK", {"lengths": [300], "prompts": [200]})
    _, rows = measure("--quick", "--dtypes", "float32")
    assert {row[:2] for row in rows} == {("call", 300), ("decode", 300), ("prefill", 200)}
    _, rows = measure("--quick", *SHORT[:2], "--prompts", 100)
    assert {row[:2] for row in rows} == {("prefill", 100)}


@pytest.mark.parametrize("shape", sorted(shapes.SHAPES))
def test_random_models_of_a_shape(shape, monkeypatch):
    """Small ones, with as many heads and as large."""
    full = shapes.SHAPES[shape]
    small = {"num_hidden_layers": 3, "vocab_size": 128, "intermediate_size": 64}
    monkeypatch.setitem(shapes.SHAPES, shape, {**full, **small})
    made = shapes.random_model(shape)
    bench = ModelBench(made, 4, {})
    heads = {"qwen3-8b": (8, 128, 128), "llama-3-8b": (8, 128, 128), "qwen2.5-0.5b": (2, 64, 64)}
    assert bench.dtype == mx.bfloat16 and bench.layers == [heads[shape]] * 3
    biases = [layer.self_attn.k_proj.get("bias") for layer in made.layers]
    if shape == "qwen2.5-0.5b":
        norms = [mx.linalg.norm(b.astype(mx.float32).reshape(2, 64), axis=1) for b in biases]
        first, middle, last = (norm.max().item() for norm in norms)
        assert 15 < middle < 30 and min(first, last) > 200
    else:
        assert biases == [None] * 3

"""What a run of ``mlx_turboquant bench`` keeps: turns, what can't be measured, files, words."""

import json

import mlx.core as mx
import pytest
from bench_runs import SHORT, failing, measure, run  # noqa: F401

from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.tools.bench import command, measurement, plot, saved
from mlx_turboquant_plugin.tools.bench.measurement import Results, Sample, Situation, Timing
from mlx_turboquant_plugin.tools.bench.model import ModelBench


def test_what_is_missing_is_said(tmp_path):
    notes = {"remarks": ["in force: sinks 8 (environment)"], "fallbacks": []}
    results = Results(done=["a"], asked=["a", "b", "c"])
    found = json.loads(saved.saved(notes, results))
    assert found["interrupted"] and found["missing"] == ["b", "c"]
    results.done += ["b", "c"]
    assert not json.loads(saved.saved(notes, results))["interrupted"]


def interrupted(*args):
    raise KeyboardInterrupt


def test_settings_and_interruptions_are_shown(monkeypatch, capsys, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[turboquant]\nsinks = 8\n[turboquant.models."*"]\nsinks = 9\n')
    monkeypatch.setenv("TURBOQUANT_CONFIG", str(file))
    prefill = ModelBench.prefill

    def second_fails(self, results, tokens, *args):
        if tokens == 50:
            raise KeyboardInterrupt
        return prefill(self, results, tokens, *args)

    monkeypatch.setattr(ModelBench, "prefill", second_fails)
    report = tmp_path / "bench.json"
    arguments = ["--parts", "prefill", "--prompts", "40", "40", "50", "--rounds", "1"]
    assert cli.main(["bench", *arguments, "--json", str(report)]) == cli.INTERRUPTED
    found, out = json.loads(report.read_text()), capsys.readouterr().out.splitlines()
    assert found["missing"] == ["prefill, batch 1, 50 tokens"]
    assert found["asked"] == ["prefill, batch 1, 40 tokens", *found["missing"]]
    assert found["notes"]["sinks"] == 8
    for line in (
        "interrupted: not measured: prefill, batch 1, 50 tokens",
        f"in force: sinks 8 (file {file} [turboquant])",
        f'not in force here, but in compare: sinks 9 (file {file} [turboquant.models."*"])',
    ):
        assert line in out
    # Stopped before it is known what is asked for.
    monkeypatch.setattr(command, "load_model", interrupted)
    assert cli.main(["bench", *arguments, "--json", str(report), "--resume"]) == cli.INTERRUPTED
    assert json.loads(report.read_text())["missing"] == found["missing"]


def test_bits_of_layers_that_the_model_lacks(monkeypatch, caplog):
    monkeypatch.setenv("TURBOQUANT_KEY_BITS", "4,3")
    assert cli.main(["bench", "--parts", "decode", "--quick"]) == cli.BAD_SETTINGS
    assert "key_bits (environment TURBOQUANT_KEY_BITS) has 2 numbers" in caplog.text


def test_turns():
    order = []

    def arm(name, seconds):
        def turn():
            order.append(name)
            return Sample(seconds, 100, len(order))

        return turn

    ticks, results = [], Results([], [])
    arms = {
        "KVCache": arm("a", 1.0),
        "QuantizedKVCache": arm("q", 20.0),
        "compressed": arm("b", 2.0),
    }
    situation = Situation(results, "decode", 300, 1, mx.float32, 1)
    situation.take_turns(arms, 6, lambda: ticks.append(1))
    assert "".join(order) == "aqb" + "ab" * 4 + "aqb"
    assert len(ticks) == 6
    timings = {m.cache: m.seconds for m in results.measurements}
    assert list(timings) == list(arms)
    assert timings["compressed"] == Timing(2.0, 2.0, 2.0, 2.0, 6)
    assert timings["QuantizedKVCache"].count == 2
    assert [m.peak_bytes for m in results.measurements] == [12, 13, 14]


@pytest.mark.parametrize("at", [1, 2])
def test_turns_go_on_without_a_cache_of_mlx_lm_that_fails(at):
    results = Results([], [])
    situation = Situation(results, "decode", 300, 1, mx.float32, 1)
    arms = {"KVCache": failing(at, MemoryError("too much")), "compressed": failing(0, None)}
    situation.take_turns(arms, 3, lambda: None)
    assert [(x.cache, x.reason) for x in results.skipped] == [("KVCache", "MemoryError: too much")]
    counts = {m.cache: m.seconds.count for m in results.measurements}
    assert counts == ({"compressed": 3} if at == 1 else {"KVCache": 1, "compressed": 3})


def test_a_turn_of_ours_that_fails_takes_no_earlier_one_along():
    results = Results([], [])
    situation = Situation(results, "decode", 300, 1, mx.float32, 1)
    arms = {"KVCache": failing(0, None), "compressed": failing(2, MemoryError("too much"))}
    with pytest.raises(MemoryError):
        situation.take_turns(arms, 3, lambda: None)
    assert [m.seconds.count for m in results.measurements] == [2, 1]


def test_a_killed_run_is_resumed(measure, monkeypatch, tmp_path, capsys):
    """What was finished is in the file at once, and is not measured again."""
    arguments = [*SHORT[:2], "--prompts", 100, 200, "--chunk", 64]
    file = tmp_path / "bench.json"
    plain, seen = ModelBench.prefill, []

    def prefill(bench, results, tokens, *others):
        if seen == [100] and tokens == 200:
            # As a process that is killed leaves it.
            seen.append(file.read_text())
        seen.append(tokens)
        return plain(bench, results, tokens, *others)

    monkeypatch.setattr(ModelBench, "prefill", prefill)
    _, whole = measure(*arguments)
    first, killed, second = seen
    assert (first, second) == (100, 200)
    assert {m["tokens"] for m in json.loads(killed)["measurements"]} == {100}
    file.write_text(killed)
    seen.clear()
    _, rows = measure(*arguments, "--resume")
    assert seen == [200] and rows.keys() == whole.keys()
    assert all(rows[row] == whole[row] for row in rows if row[1] == 100)
    seen.clear()
    measure(*arguments, "--resume")
    assert seen == []


def test_what_was_left_in_its_middle_is_measured_again(tmp_path):
    results = Results()
    for title, cache in (("a", "KVCache"), ("b", "compressed")):
        situation = Situation(results, "decode", 300, 1, mx.float32, 1)
        situation.skip("QuantizedKVCache", "why")
        situation.take_turns({cache: lambda: Sample(1.0, 100)}, 3, lambda: None)
        if title == "a":
            results.finish(title)
    file = tmp_path / "x.json"
    file.write_text(saved.saved({"fallbacks": []}, results))
    again = saved.resume(file, {"fallbacks": ["other"]})
    assert again.measurements == results.measurements[:1] and len(results.measurements) == 2
    assert again.skipped == results.skipped[:1] and again.done == ["a"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("nothing", "is not what bench --json writes"),
        ("[]", "is not what bench --json writes"),
        ('{"notes": {}}', "is not what bench --json writes"),
        (None, "was measured with chunk 64, and now it is 32: use the same arguments"),
    ],
)
def test_files_that_cannot_be_resumed(text, said, tmp_path, caplog):
    file = tmp_path / "x.json"
    if text is None:
        assert run(*SHORT, "--json", file) == 0
    else:
        file.write_text(text)
    assert run(*SHORT[:-1], 32, "--json", file, "--resume") == cli.BAD_SETTINGS
    assert said in caplog.text
    assert text is None or file.read_text() == text


def test_resuming_needs_a_file(caplog):
    assert run(*SHORT, "--resume") == cli.BAD_SETTINGS
    assert "--resume needs --json FILE" in caplog.text


@pytest.mark.parametrize(
    "message",
    [
        "QuantizedMatmul has no CUDA implementation.",
        "[QQMatmul] NYI",
        "[gather] not yet implemented",
    ],
)
def test_what_mlx_cannot_run_here_is_said(message):
    results = Results()
    situation = Situation(results, "decode", 300, 1, mx.float32, 1)
    situation.attempt("QuantizedKVCache", failing(1, RuntimeError(message)))
    assert results.skipped[0].reason.startswith(f"MLX can't run it on {mx.default_device()}: ")
    assert message in results.skipped[0].reason


def test_ratios_in_words():
    def measured(tokens, cache, seconds, size):
        return measurement.Measurement(
            "decode", tokens, 1, "float32", cache, 1, None, [seconds], size, size
        )

    rows = [
        measured(1024, "KVCache", 1.0, 400), measured(1024, "compressed", 2.0, 100),
        measured(2048, "KVCache", 3.0, 800), measured(2048, "compressed", 2.0, 100),
        measured(4096, "compressed", 2.0, 100),
    ]  # fmt: skip
    words = {
        panel.title: plot.in_words(panel, rows) for panel in plot.PANELS if panel.part == "decode"
    }
    assert words == {
        "decoding": ["compressed: 0.50 to 1.50 times as fast as KVCache"],
        "cache": ["compressed: 4.00 to 8.00 times smaller than KVCache"],
        "decoding, peak memory": ["compressed: 4.00 to 8.00 times smaller than KVCache"],
    }
    call = next(panel for panel in plot.PANELS if panel.part == "call")
    assert plot.in_words(call, rows[:2]) == ["compressed: 0.50 times as fast as KVCache"]


def test_timing():
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 3.0, 1)
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 10.0]) == Timing(3.0, 2.0, 4.0, 4.0, 5)

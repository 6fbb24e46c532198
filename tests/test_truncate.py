"""The command ``mlx_turboquant truncate``: it passes sound caches and finds damaged ones."""

import json

import pytest
import tiny

from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.cli import main


def truncate(path, *arguments):
    code = main(
        ["truncate", "--model", str(tiny.PATHS["tiny-llama"]), "--text", str(tiny.TEXT)]
        + ["--length", "500", "--chunk", "200", *arguments, "--json", str(path)]
    )
    return code, json.loads(path.read_text())["cuts"]


def test_short_cuts_leave_no_trace_and_long_ones_are_explained(tmp_path):
    code, cuts = truncate(
        tmp_path / "cuts.json", "--at", "341", "341", "--remove", "16", "130", "16"
    )
    assert code == 0
    short, long = cuts
    assert (short["removed"], short["recoded"], short["outcome"]) == (16, 0, "equal")
    assert long["recoded"] > 0 and long["outcome"] == "explained"
    assert 1e-6 < long["kl"] < 1e-2
    assert short["same_codes"] == long["same_codes"] == 1.0


def test_a_cut_that_keeps_too_much_is_found(tmp_path, monkeypatch, capsys):
    trim = CompressedKVCache.trim
    monkeypatch.setattr(CompressedKVCache, "trim", lambda self, n: trim(self, n - 1))
    code, [cut] = truncate(tmp_path / "cuts.json", "--at", "341", "--remove", "5")
    assert code == 1 and cut["outcome"] == "differs"
    assert "differs" in capsys.readouterr().out


def test_codes_that_a_cut_damages_are_found(tmp_path, monkeypatch):
    trim = CompressedKVCache.trim

    def damaged(self, n):
        done = trim(self, n)
        self.value_codes = tuple(codes ^ 1 for codes in self.value_codes)
        return done

    monkeypatch.setattr(CompressedKVCache, "trim", damaged)
    code, [cut] = truncate(tmp_path / "cuts.json", "--at", "341", "--remove", "130")
    assert code == 1 and cut["outcome"] == "differs" and cut["same_codes"] < 0.9


@pytest.mark.parametrize(
    "arguments, named",
    [(["--at", "499"], "--at 499"), (["--remove", "600"], "--remove"), (["--at", "0"], "--at")],
)
def test_mistakes_are_named(arguments, named, caplog, capsys):
    model = ["truncate", "--model", str(tiny.PATHS["tiny-llama"]), "--length", "500"]
    try:
        assert main([*model, *arguments]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    assert named in caplog.text + capsys.readouterr().err

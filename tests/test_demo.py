"""The command ``mlx_turboquant demo``."""

import tiny

from mlx_turboquant_plugin.cli import main
from mlx_turboquant_plugin.models import prompt_cache


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

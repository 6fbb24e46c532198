"""Short runs of ``mlx_turboquant bench``, for tests."""

import json

import pytest

from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.tools.bench.measurement import Sample

SMALL = ["--rounds", "1", "--layers", "1", "--heads", "4", "2", "--head-dim", "64"]
SHORT = ["--parts", "prefill", "--prompts", 200, "--chunk", 64]


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


def failing(at, error):
    """An arm that raises ``error`` in turn ``at``."""
    turns = []

    def turn():
        turns.append(1)
        if len(turns) == at:
            raise error
        return Sample(1.0, 100)

    return turn

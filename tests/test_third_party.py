"""Another package supports its own model: a real one, installed in a virtual environment."""

import shutil

import numpy as np
import pytest
from processes import ROOT
from test_packaging import Environment

TOY = ROOT / "tests" / "data" / "toy_models"

pytest.importorskip("hatchling", reason="what builds the packages; pip install '.[dev]'")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The plugin and the toy package, side by side."""
    environment = Environment(tmp_path_factory.mktemp("third-party"))
    source = shutil.copytree(TOY, tmp_path_factory.mktemp("source") / "toy_models")
    environment.pip(
        "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed",
        ROOT, source,
    )  # fmt: skip
    return environment


@pytest.fixture
def toy(installed, tmp_path):
    def run(**variables):
        """(logits, what the run printed, its log) of the toy model as it is installed."""
        done = installed.run("-P", TOY / "job.py", tmp_path / "logits.npy", **variables)
        return np.load(tmp_path / "logits.npy"), done.stdout.split(), done.stderr

    return run


def test_the_model_of_another_package_is_compressed(toy):
    plain, (*stock, full), _ = toy()
    assert stock == ["KVCache"] * 2
    identity, (*kinds, _), _ = toy(TURBOQUANT="1", TURBOQUANT_BYPASS="identity")
    assert kinds == ["CompressedKVCache"] * 2
    np.testing.assert_allclose(identity, plain, atol=1e-4)
    bridge, _, _ = toy(TURBOQUANT="1", TURBOQUANT_BYPASS="bridge")
    made, (*kinds, small), log = toy(TURBOQUANT="1", TURBOQUANT_LOG="INFO")
    assert kinds == ["CompressedKVCache"] * 2 and int(small) < int(full)
    np.testing.assert_allclose(made, bridge, atol=1e-4)
    assert 1e-4 < np.abs(made - plain).max() < 0.1 * np.abs(plain).max()
    assert "toy: 2 of 2 layers compressed, keys 4 bits" in log


def test_it_can_be_opted_out(toy):
    plain, _, _ = toy()
    left, (*kinds, _), log = toy(TURBOQUANT="1", TURBOQUANT_OPT_OUT="toy")
    assert kinds == ["KVCache"] * 2 and (left == plain).all()
    assert log.count("toy runs uncompressed: opt_out pattern 'toy' matches it") == 1


def test_without_the_entry_point_it_runs_as_it_is(installed, toy):
    plain, _, _ = toy()
    [points] = installed.site.glob("toy_models-*.dist-info/entry_points.txt")
    points.rename(points.with_suffix(".off"))
    try:
        left, (*kinds, _), log = toy(TURBOQUANT="1")
    finally:
        points.with_suffix(".off").rename(points)
    assert kinds == ["KVCache"] * 2 and (left == plain).all()
    assert log.count("toy runs uncompressed: this architecture is not supported") == 1


def test_hooks_written_for_the_former_path_go_on():
    from mlx_turboquant_plugin.models.attention import patch_family
    from mlx_turboquant_plugin.models.family import Family

    from mlx_turboquant_plugin.integration import attention, family

    assert patch_family is attention.patch_family and Family is family.Family

"""mlx-lm's own tests pass with the plugin where they pass without.

MLX_LM_TESTS names the folder ``tests`` of the source distribution of the installed mlx-lm. What
these download must be in the hub's cache already, or they fail both times.
"""

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from processes import run

FOLDER = Path(os.environ.get("MLX_LM_TESTS", "not set"))
# They ask for mlx-lm's own classes of caches.
EXPECTED = {
    "test_batch_max_kv_size_creates_rotating_cache",
    "test_batch_max_kv_size_none_creates_regular_cache",
    "test_completion_quantizes_the_cache",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="MLX_LM_TESTS names no folder"),
]


def passed(file, report, **environment):
    """The names of the tests of a file that pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--rootdir={FOLDER}",
        "-p",
        "no:cacheprovider",
    ]
    run([*command, FOLDER / file, f"--junitxml={report}"], check=False, **environment)
    cases = ElementTree.parse(report).iter("testcase")
    return {case.get("name") for case in cases if not len(case)}


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_what_passes_without_the_plugin_passes_with_it(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without = passed(file, tmp_path / "without.xml")
    assert without - passed(file, tmp_path / "with.xml", TURBOQUANT="1") <= EXPECTED

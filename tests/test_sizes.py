"""Launchers and device code have their sizes from one table."""

import re

import pytest
from processes import ROOT

from mlx_turboquant_plugin.backends import sizes

BACKENDS = ROOT / "mlx_turboquant_plugin/backends"
CODE = sorted(path for end in ("cu", "cuh", "metal") for path in BACKENDS.glob(f"*/*.{end}"))
NAMES = {
    name
    for table in vars(sizes).values()
    if isinstance(table, type)
    for name in vars(table)
    if name.isupper()
}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_device_code_defines_none_of_them(path):
    text = path.read_text("utf-8")
    # Those of a function, which are indented, are its own.
    defined = re.findall(r"^(?:constant )?constexpr \w+ (\w+) =|^#define (\w+)", text, re.M)
    assert not NAMES & {name for pair in defined for name in pair}


def test_both_languages_have_the_same_numbers():
    metal, cuda = (
        dict(re.findall(r"(\w+)(?: =)? (-?[\d.]+)", sizes.constants(sizes.Codes, integer=language)))
        for language in (sizes.METAL, sizes.CUDA)
    )
    assert metal == cuda
    assert metal["STEPS_PER_OCTAVE"] == "12" and metal["OFFSET"] == "127.5"

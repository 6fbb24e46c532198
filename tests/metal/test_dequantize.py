"""The Metal kernel that dequantizes, in the emulator."""

import emulator
import mlx.core as mx
import pytest
from dequantized import CASES, PASSES, check, check_passes, check_short_rows

from mlx_turboquant_plugin.backends.metal import launch as metal

pytestmark = pytest.mark.skipif(
    emulator.unavailable() is not None, reason=str(emulator.unavailable())
)


@pytest.fixture(params=[(0, 0), (3, 1)], ids=lambda run: "schedule{}-poison{}".format(*run))
def emulated(request):
    metal.kernel.cache_clear()
    schedule, poison = request.param
    # An emulated kernel needs numbers, which are not there while a function is traced.
    mx.disable_compile()
    with emulator.patch(mode="checked", schedule=schedule, poison=poison):
        yield
    mx.enable_compile()
    metal.kernel.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_lays_out_what_operations_do(case, emulated):
    check(case, "metal")


@pytest.mark.parametrize("chunks, settings", PASSES, ids=str)
def test_prompts_come_to_what_they_do_by_operations(chunks, settings, emulated, monkeypatch):
    check_passes(chunks, settings, "metal", monkeypatch)


def test_short_rows_of_a_pass(emulated, monkeypatch):
    check_short_rows("metal", monkeypatch)

"""The Metal kernel that dequantises, in the emulator."""

import emulator
import pytest
from dequantized import CASES, check

from mlx_turboquant_plugin.kernels import metal

pytestmark = pytest.mark.skipif(
    emulator.unavailable() is not None, reason=str(emulator.unavailable())
)


@pytest.fixture(params=[(0, 0), (3, 1)], ids=lambda run: "schedule{}-poison{}".format(*run))
def emulated(request):
    metal.kernel.cache_clear()
    schedule, poison = request.param
    with emulator.patch(mode="checked", schedule=schedule, poison=poison):
        yield
    metal.kernel.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_lays_out_what_operations_do(case, emulated):
    check(case, "metal")

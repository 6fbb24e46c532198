"""Powers that the CPU computes several at a time, against NumPy's in fp64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_turboquant_plugin.codecs.exponential import exp, exp2


@pytest.fixture(params=["as it is", "compiled"])
def ways(request):
    """Both functions, as eager and as compiled attention call them."""
    if request.param == "as it is":
        return exp, exp2
    return tuple(mx.compile(function, shapeless=True) for function in (exp, exp2))


def test_powers_of_two(ways):
    _, exp2 = ways
    x = np.linspace(-60, 0, 200_001, dtype=np.float32)
    assert np.abs(np.array(exp2(mx.array(x))) / np.exp2(x.astype(np.float64)) - 1).max() < 3e-6
    whole = np.arange(-60, 1, dtype=np.float32)
    assert np.abs(np.array(exp2(mx.array(whole))) / np.exp2(whole) - 1).max() < 3e-6


def test_powers_of_e(ways):
    exp, _ = ways
    x = np.linspace(-100, 0, 200_001, dtype=np.float32)
    power, expected = np.array(exp(mx.array(x))), np.exp(x.astype(np.float64))
    assert np.abs(power - expected).max() < 3e-7
    seen = expected > 1e-9
    assert np.abs(power[seen] / expected[seen] - 1).max() < 2e-6


def test_the_ends(ways):
    exp, exp2 = ways
    for function in (exp, exp2):
        # What a softmax meets: the largest score, and masked ones.
        powers = function(mx.array([0.0, -0.0, -1e30, -float("inf"), float("nan")]))
        assert powers[:4].tolist() == [1, 1, 0, 0]
        assert mx.isnan(powers[4]).item()


def test_other_devices_use_their_own(monkeypatch):
    x = mx.linspace(-30, 0, 1001)
    expected = mx.exp(x)
    assert not mx.array_equal(exp(x), expected).item() or mx.default_device().type == mx.gpu
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert mx.array_equal(exp(x), expected).item()

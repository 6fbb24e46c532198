"""``mlx_turboquant selftest``, and that it would notice."""

import mlx.core as mx
import pytest

from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.attention import dispatch, fused
from mlx_turboquant_plugin.cache import compressed
from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.evaluation import selftest
from mlx_turboquant_plugin.evaluation.selftest import QUICK, check, table
from mlx_turboquant_plugin.kernels import fused_kernels


@pytest.mark.parametrize("kernel", ["eager", "compiled", *fused_kernels()])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_every_kernel_passes(case, kernel):
    result = check(case, kernel)
    assert result.ok, result


def test_the_command(capsys):
    assert cli.main(["selftest", "--quick", "--kernel", "compiled"]) == 0
    lines = capsys.readouterr().out.splitlines()
    if not fused_kernels():
        assert "no fused kernel runs on Device(" in lines.pop(0)
    assert len(lines) == len(QUICK) + 1
    assert all(line.endswith("OK") for line in lines)
    assert lines[-1] == f"{len(QUICK)} of {len(QUICK)} OK"


def test_a_kernel_that_this_machine_lacks(capsys, caplog):
    missing = next(name for name in ("metal", "cuda") if name not in fused_kernels())
    assert cli.main(["selftest", "--kernel", missing]) == cli.BAD_SETTINGS
    assert f"TURBOQUANT_KERNEL is '{missing}'" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out * 1.001,
        lambda out: out * mx.where(mx.arange(out.shape[-1]) == 3, -1, 1),
        lambda out: out[:, ::-1],
        lambda out: out * mx.nan,
    ],
    ids=["a little", "one channel", "heads", "nan"],
)
def test_a_wrong_kernel_fails(wrong, monkeypatch, capsys):
    attend = dispatch.attend_tiles
    monkeypatch.setattr(dispatch, "attend_tiles", lambda *args: wrong(attend(*args)))
    monkeypatch.setattr(selftest, "QUICK", QUICK[:1])
    assert cli.main(["selftest", "--quick", "--kernel", "eager"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["encode_keys", "encode_values"])
def test_codes_that_lose_too_much_fail(side, monkeypatch):
    encode = getattr(KVCodec, side)

    def a_size_too_large(*args):
        *planes, sizes = encode(*args)
        return (*planes, sizes + 3)

    monkeypatch.setattr(KVCodec, side, a_size_too_large)
    result = check(QUICK[0], "eager")
    assert result.error <= result.tolerance and not result.ok
    assert "codes lose" in result.note


def test_a_kernel_that_leaves_its_work_to_another_fails(monkeypatch):
    monkeypatch.setattr(fused, "_fallbacks", [])
    monkeypatch.setattr(dispatch, "attend_fused", lambda kernel, problem: dispatch.fall_back(
        kernel, "anything"
    ))
    monkeypatch.setattr(compressed, "encoder", lambda kernel: KVCodec)
    result = check(QUICK[0], "metal")
    assert result.error <= result.tolerance and not result.ok
    assert "the metal kernel does not support anything" in result.note


def test_the_table_has_every_shape_codec_and_dtype():
    cases = list(table())
    assert {case.dim for case in cases} >= {64, 80, 96, 112, 128, 256}
    assert {case.groups for case in cases} >= {*range(1, 9), 12, 16}
    assert {case.count for case in cases} >= set(range(1, 9))
    assert {case.dtype for case in cases} == {"float32", "float16", "bfloat16"}
    lloyd = {(c.keys[1], c.values[1]) for c in cases if c.keys[0] == c.values[0] == "lloyd-max"}
    assert lloyd == {(k, v) for k in (2, 3, 4) for v in (2, 3, 4)}
    assert {c.keys[1] for c in cases if c.keys[0] == "affine"} == {2, 3, 4, 8}
    assert {c.values[1] for c in cases if c.values[0] == "affine"} == {2, 3, 4, 8}
    assert any(len(case.lengths) > 1 for case in cases)
    # With codes, and steps of decoding before.
    assert {(len(case.lengths), case.steps > 1) for case in cases} >= {(1, True), (2, True)}
    assert len(set(cases)) == len(cases)

"""``mlx_turboquant selftest``, and that it would notice."""

import itertools

import mlx.core as mx
import pytest

from mlx_turboquant_plugin import cli
from mlx_turboquant_plugin.attention import dispatch, fused
from mlx_turboquant_plugin.backends import backend, fused_kernels, support
from mlx_turboquant_plugin.backends.cuda import attend as cuda
from mlx_turboquant_plugin.backends.cuda import encode as cuda_encode
from mlx_turboquant_plugin.backends.cuda import portable as cuda_portable
from mlx_turboquant_plugin.backends.cuda import source as cuda_source
from mlx_turboquant_plugin.cache import Visibility
from mlx_turboquant_plugin.cache.passes import plan_step
from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.tools import checked_layer, selftest
from mlx_turboquant_plugin.tools.cases import QUICK, table
from mlx_turboquant_plugin.tools.selftest import check

PROMPTS = [case for case in QUICK if case.count > 16]


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
    with pytest.raises(SystemExit):
        cli.main(["selftest", "--kernel", "opencl"])
    assert "--kernel: invalid choice: 'opencl'" in capsys.readouterr().err
    assert f"--kernel is '{missing}', which this machine can't run" in caplog.text


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
    monkeypatch.setattr(
        dispatch,
        "attend_fused",
        lambda queries, source, *_: dispatch.fall_back(source.backend, "anything"),
    )
    monkeypatch.setattr(backend("metal"), "encode", KVCodec.encode)
    monkeypatch.setattr(backend("metal"), "passes", lambda *args: False)
    # Whether or not the same has been said before.
    for _ in range(2):
        result = check(QUICK[0], "metal")
        assert result.error <= result.tolerance and not result.ok
        assert "the metal kernel does not support anything" in result.note


def test_all_that_falls_back_in_a_case_is_told(monkeypatch):
    causes = itertools.cycle(["this", "that"])
    attend = dispatch.attend_tiles

    def leaving(*args):
        dispatch.fall_back(backend("metal"), next(causes))
        return attend(*args)

    monkeypatch.setattr(dispatch, "attend_tiles", leaving)
    case = next(case for case in QUICK if case.steps == 2)
    notes = check(case, "eager").note.split("; ")
    assert [note.split(":")[0] for note in notes] == [
        "the metal kernel does not support this",
        "the metal kernel does not support that",
    ]


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompts_pass_as_on_a_gpu(case, monkeypatch):
    monkeypatch.setattr(support, "on_gpu", lambda: True)
    result = check(case, "eager")
    assert result.ok, result


@pytest.fixture
def another_rule(monkeypatch):
    rule = Visibility.is_prompt
    monkeypatch.setattr(
        Visibility, "is_prompt", lambda self, count: count > 16 and not rule(self, count)
    )
    # Of which steps are planned once.
    plan_step.cache_clear()
    yield
    plan_step.cache_clear()


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompts_that_read_by_another_rule_fail(case, another_rule):
    # Unless all queries are in one block.
    same = all((t - case.count) // 32 == (t - 1) // 32 for t in case.lengths)
    assert check(case, "eager").ok == same


@pytest.mark.parametrize("everything", [False, True])
def test_the_table_has_every_shape_codec_and_dtype(everything):
    cases = list(table(everything))
    assert {case.groups for case in cases} >= {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}
    assert {case.count for case in cases} >= {*range(1, 9), 12, 17, 40, 100, 300}
    assert {case.invariant for case in cases if case.count > 16} == {False, True}
    for some in ([c for c in cases if c.count <= 8], [c for c in cases if c.count > 16]):
        assert {case.dim for case in some} >= {64, 80, 96, 112, 128, 256}
        assert {case.dtype for case in some} == {"float32", "float16", "bfloat16"}
        lloyd = {(c.keys[1], c.values[1]) for c in some if c.keys[0] == c.values[0] == "lloyd-max"}
        assert lloyd == {(k, v) for k in (2, 3, 4) for v in (2, 3, 4)}
        assert {c.keys[1] for c in some if c.keys[0] == "affine"} == {2, 3, 4, 8}
        assert {c.values[1] for c in some if c.values[0] == "affine"} == {2, 3, 4, 8}
        assert {c.rope for c in some if c.extras} == {"halves", "traditional", "partial"}
        assert any(case.ring for case in some)
        # With codes, and steps of decoding before.
        assert {(len(c.lengths), c.steps > 1) for c in some} >= {(1, True), (2, True)}
    assert len(set(cases)) == len(cases)
    assert everything or set(cases) < set(table(everything=True))


def test_a_gpu_compiles_few_kernels(monkeypatch):
    """A kernel of decoding takes an NVIDIA GPU a second and more."""
    compiled = set()

    class Kernel:
        def __init__(self, name, inputs, outputs, body):
            self.name, self.body = name, body

        def __call__(self, inputs, output_shapes, output_dtypes, template=(), **launch):
            types = *(x.dtype for x in inputs), *output_dtypes
            compiled.add((self.name, self.body, str(types), str(template)))
            return [mx.zeros(*like) for like in zip(output_shapes, output_dtypes)]

    makers = cuda._attention, cuda._split_kernel, cuda._merge_kernel
    makers += cuda_encode._encode_kernel, cuda_portable.kernel
    monkeypatch.setattr(cuda_source, "kernel", Kernel)
    monkeypatch.setattr(support, "on_gpu", lambda: True)
    # Nothing need be computed.
    monkeypatch.setattr(
        checked_layer,
        "scaled_dot_product_attention",
        lambda queries, *args, **kw: mx.zeros_like(queries),
    )
    mx.disable_compile()
    for maker in makers:
        maker.cache_clear()
    for case in table():
        # Longer ones share the kernels of others.
        if max(case.lengths) < 1000:
            checked_layer.CheckedLayer(case, "cuda").attend()
    for maker in makers:
        maker.cache_clear()
    mx.enable_compile()
    names = [name for name, *_ in compiled]
    assert names.count("split") + names.count("metal_decode") <= 60
    assert names.count("encode") + names.count("metal_dequantize") <= 130

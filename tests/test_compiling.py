"""Machines without a C++ compiler, with one that fails, and the first use on one that has it."""

import json
import sys

import mlx.core as mx
import processes
import pytest
import tiny

from mlx_turboquant_plugin import building, compiling
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec
from mlx_turboquant_plugin.tools.demo import MODEL

pytestmark = pytest.mark.skipif(
    mx.default_device().type == mx.gpu, reason="MLX needs no C++ compiler for a GPU"
)

MISSING = "without a C++ compiler MLX runs it uncompiled, slower: install g++"
FAILS = "g++ fails and MLX runs it uncompiled, slower: reinstall g++"
PROMPT = tiny.TEXT.read_text("utf-8")[:1500]


NO_FOLDER = (
    "the folder for temporary files can't be used and MLX runs it uncompiled, slower: set TMPDIR"
)


@pytest.fixture(params=["missing", "failing", "no folder"])
def bad_compiler(request, tmp_path):
    """(variables of an environment with that compiler and nothing compiled yet, the advice)."""
    if request.param == "no folder":
        return {"TMPDIR": str(tmp_path / "none"), "TURBOQUANT_LOG": "WARNING"}, NO_FOLDER
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    if request.param == "failing":
        (tools / "g++").write_text('#!/bin/sh\n[ "$1" = --version ]\n')
        (tools / "g++").chmod(0o755)
    variables = {"PATH": str(tools), "TMPDIR": str(tmp_path), "TURBOQUANT_LOG": "WARNING"}
    return variables, MISSING if request.param == "missing" else FAILS


def run_module(module, *arguments, **variables):
    """Run a module of mlx_lm or the command line, as if ``TURBOQUANT`` were read at the start."""
    code = (
        "import runpy, sys; from mlx_turboquant_plugin import activation\n"
        "activation.enable_from_environment(); sys.argv[:] = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=False)"
    )
    return processes.run_python("-c", code, module, *arguments, **variables)


def test_generation_goes_on_uncompiled(bad_compiler):
    variables, advice = bad_compiler
    done = run_module(
        "mlx_lm.generate",
        *("--model", MODEL, "--prompt", PROMPT, "--max-tokens", "8"),
        **{**variables, "TURBOQUANT": "1"},
    )
    assert "Generation: 8 tokens" in done.stdout
    warnings = [x for x in done.stderr.splitlines() if x.startswith("mlx_turboquant_plugin")]
    assert len(warnings) == (advice != MISSING)


def test_commands_say_what_runs(bad_compiler):
    variables, advice = bad_compiler
    commands = "from mlx_turboquant_plugin import cli; import sys; sys.exit(cli.main(sys.argv[1:]))"
    said = processes.run_python("-c", commands, "status", **variables).stdout
    [chosen] = [line for line in said.splitlines() if line.startswith("  chosen ")]
    assert f"compiled, but {advice}" in chosen
    demo = "demo", "--max-tokens", "2", "--prompt", PROMPT
    said = processes.run_python("-c", commands, *demo, **variables).stdout
    assert f"kernel: compiled, but {advice}" in said


def test_codes_are_made_by_hand_without_a_compiler(bad_compiler):
    variables, _ = bad_compiler
    code = (
        "import mlx.core as mx\n"
        "from mlx_turboquant_plugin.cache import CompressedKVCache\n"
        "cache = CompressedKVCache()\n"
        "x = mx.random.normal((1, 2, 512, 64))\n"
        "mx.eval(cache.update_and_fetch(x, x))\n"
        "print(cache.quantized)"
    )
    assert int(processes.run_python("-c", code, **variables).stdout) > 0


def test_mlx_switched_off_is_not_called_a_missing_compiler():
    code = "from mlx_turboquant_plugin import compiling; print(compiling.problem())"
    done = processes.run_python("-c", code, MLX_DISABLE_COMPILE="1")
    assert "MLX_DISABLE_COMPILE is set" in done.stdout


def test_functions_run_as_they_are_while_another_process_compiles(monkeypatch, tmp_path):
    traces = []
    function = compiling.compiled(lambda x: traces.append(x) or x * 3 + 1)
    builder = [sys.executable, "-c", "input()"]
    job = json.dumps(CodecSpec(64, 64))
    monkeypatch.setattr(compiling, "_here", False)
    monkeypatch.setattr(compiling, "_builders", {})
    monkeypatch.setattr(compiling, "_building", False)
    monkeypatch.setattr(compiling, "finished", lambda job: tmp_path / "finished")
    popen = compiling.subprocess.Popen

    def waiting(command, **options):
        assert command[1:] == ["-m", "mlx_turboquant_plugin.building", job]
        return popen(builder, stdin=compiling.subprocess.PIPE)

    monkeypatch.setattr(compiling.subprocess, "Popen", waiting)
    compiling.prepare(job)
    assert "still being built" in compiling.uncompiled()
    for _ in range(2):
        assert function(mx.array(2)).item() == 7
    assert len(traces) == 2
    process = compiling._builders[job]
    process.communicate(b"\n")
    # Until somebody asks, so that no generation changes midway.
    assert "still being built" in compiling.uncompiled()
    compiling.update()
    assert compiling.uncompiled() is None
    for _ in range(2):
        assert function(mx.array(2)).item() == 7
    assert len(traces) == 3


def test_nothing_is_compiled_ahead_twice(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_here", False)
    monkeypatch.setattr(compiling, "_builders", {})
    monkeypatch.setattr(compiling, "_start", lambda job: pytest.fail("it was there"))
    monkeypatch.setattr(compiling, "finished", lambda job: tmp_path)
    compiling.prepare("job")
    assert compiling.uncompiled() is None


def test_another_compiler_is_asked_again(monkeypatch, tmp_path):
    ids = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "g++").write_text("#!/bin/sh\n")
        (tmp_path / name / "g++").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / name))
        ids.append(compiling._compiler_id())
    assert ids[0] != ids[1]


# What mlx-lm itself compiles for the demo's model, and the question whether g++ works.
NOT_OURS = 2


def libraries(folder):
    """How many libraries MLX has made there."""
    return len([*folder.rglob("*.so")])


def generate(folder, patch):
    """Generate as on a machine with nothing compiled but what ``folder`` holds."""
    code = (
        "import mlx_lm; from pathlib import Path; import mlx_turboquant_plugin as plugin\n"
        f"from mlx_turboquant_plugin import compiling\n{patch}\nplugin.enable()\n"
        f"model, tokenizer = mlx_lm.load({str(MODEL)!r})\n"
        f"print(mlx_lm.generate(model, tokenizer, {PROMPT!r}, max_tokens=40))"
    )
    processes.run_python("-c", code, TMPDIR=str(folder))


def test_the_first_prompt_waits_for_nothing_of_ours_to_be_compiled(tmp_path):
    # Another process that is never done, in place of the true one.
    never = "compiling._start = lambda job: type('Builder', (), {'poll': lambda self: None})()"
    generate(tmp_path, never)
    assert 0 < libraries(tmp_path) <= NOT_OURS


def test_it_compiles_for_codecs_that_the_selftest_does_not_know(monkeypatch, tmp_path):
    done = tmp_path / "finished"
    monkeypatch.setattr(building, "finished", lambda job: done)
    monkeypatch.setattr(building, "WORK", ({"lengths": (300,)},))
    building.build(json.dumps(CodecSpec(64, 64, "exact", 4, "exact", 4)))
    assert done.exists()


@pytest.mark.slow
def test_what_another_process_compiles_is_all_that_a_model_needs(tmp_path):
    job = json.dumps(CodecSpec(128, 128))
    processes.run_python("-m", "mlx_turboquant_plugin.building", job, TMPDIR=str(tmp_path))
    before = libraries(tmp_path)
    generate(tmp_path, "compiling._start = None")
    assert libraries(tmp_path) - before <= NOT_OURS

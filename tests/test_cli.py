"""What every subcommand does about Ctrl-C, closed pipes and places that are not there."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
from processes import ROOT, clean_environ, run_python

from mlx_turboquant_plugin import __version__, cli, status_command
from mlx_turboquant_plugin.rules import SettingsError
from mlx_turboquant_plugin.tools import comparison, demo, drift, progress, truncate
from mlx_turboquant_plugin.tools.arguments import output_file
from mlx_turboquant_plugin.tools.output import as_json, show
from mlx_turboquant_plugin.tools.runs import load_model

COMMAND = [sys.executable, "-m", "mlx_turboquant_plugin"]


def start(*arguments, **options):
    environ = clean_environ(PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        **options,
    )


def test_the_package_can_be_run():
    assert run_python("-m", "mlx_turboquant_plugin", "--version").stdout.strip() == __version__


def heed_ctrl_c():
    """What a shell starts with ``&`` ignores it, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(process):
    """What it still writes. A signal is lost while MLX waits for g++, so it may take several."""
    for attempt in range(12):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            if attempt == 11:
                raise


def test_ctrl_c_keeps_what_was_checked():
    with start("selftest", "--kernel", "eager", preexec_fn=heed_ctrl_c) as process:
        first = [process.stdout.readline() for _ in range(3)]
        out, err = interrupted(process)
    assert process.returncode == cli.INTERRUPTED
    assert err == "" and first[-1].endswith("OK\n")
    checked = [line for line in (*first, *out.splitlines()) if line.startswith("eager")]
    *_, summary, last = out.splitlines()
    assert summary == f"{len(checked)} of {len(checked)} OK"
    assert last.startswith("interrupted")


def test_a_closed_pipe_is_no_traceback():
    with start("selftest", "--quick", "--kernel", "eager") as process:
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (cli.CLOSED, "")


def test_who_reads_a_pipe_sees_each_line_at_once(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def run(args):
        sys.stdout.write("a line\n")
        assert os.read(reading, 100) == b"a line\n"
        return 0

    monkeypatch.setattr(status_command, "run", run)
    with os.fdopen(reading), os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["status"]) == 0


def test_ctrl_c_that_ends_the_reader_too(monkeypatch):
    """As in ``mlx_turboquant bench | tee FILE``."""
    reading, writing = os.pipe()
    os.close(reading)

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(status_command, "run", interrupted)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["status"]) == cli.CLOSED


@pytest.mark.parametrize("arguments", [["status"], ["bench", "--json", "x.json"]], ids=str)
def test_a_deleted_working_directory(arguments, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    with start(*arguments, cwd=gone, preexec_fn=gone.rmdir) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (cli.BAD_SETTINGS, "")
    assert err == "the working directory was deleted: change to another one\n"


BENCH = ["bench", "--model", "no-such-model"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([*BENCH, "--plot", "/proc/speed.svg"], "'/proc/speed.svg' can't be written: "),
        ([*BENCH, "--json", "/proc/speed.json"], "'/proc/speed.json' can't be written: "),
        (
            [*BENCH, "--plot", "speed.html"],
            "it is named like html, and svg is written: name it .svg",
        ),
        ([*BENCH, "--plot", "speed.PNG"], "named like png"),
        (["compare", "--model", "x", "--html", "/proc/report.html"], "can't be written: "),
        (["compare", "--model", "x", "--html", "report.json"], "named like json"),
    ],
)
def test_files_that_can_not_be_written_are_found_first(
    arguments, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == cli.BAD_SETTINGS
    assert named in capsys.readouterr().err


def test_trying_a_file_leaves_it_as_it_is(tmp_path):
    new, old, pipe = (tmp_path / name for name in ("new.json", "old.json", "pipe"))
    old.write_text("before")
    os.mkfifo(pipe)
    for path in (new, old, pipe):
        assert output_file("json")(str(path)) == path
    assert not new.exists() and old.read_text() == "before"


def test_a_file_that_can_not_be_written_is_no_traceback(tmp_path, capsys):
    with pytest.raises(SettingsError, match="can't be written"):
        show(["a line"], (None, str), (tmp_path / "gone" / "speed.svg", str))
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("folder", [False, True])
def test_gguf_is_named(folder, tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(SettingsError, match="which is GGUF, and mlx-lm reads safetensors"):
        load_model(str(tmp_path if folder else path))


def test_the_reader_is_gone_and_the_file_is_written(tmp_path, monkeypatch):
    """What took minutes to measure is not lost with ``| head``."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    file = tmp_path / "cuts.json"
    with pytest.raises(BrokenPipeError):
        show(["a line"], (file, lambda: as_json(["equal"])))
    assert json.loads(file.read_text()) == ["equal"]


def raising(error, times):
    """A stand-in for a function: ``error`` from the call after so many."""

    def instead(function):
        calls = []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > times:
                raise error
            return function(*args, **kwargs)

        return call

    return instead


TEXT = ["--model", str(tiny.PATHS["tiny-llama"]), "--text", str(tiny.TEXT), "--windows", "2"]
COMPARE = ["--length", "64", "--presets", "small", "--beside", "--generate", "4"]


@pytest.mark.parametrize(
    "module, name, arguments, kept",
    [
        (comparison, "lockstep", COMPARE, "1 x 64 tokens"),
        (comparison, "generate", COMPARE, "2 x 64 tokens"),
        (drift, "lockstep", ["--length", "170", "--preset", "small"], "1 x 170 tokens"),
        (truncate, "lockstep", ["--length", "400", "--at", "40", "--remove", "1"], "kept  removed"),
    ],
)
def test_ctrl_c_keeps_what_was_measured(
    module, name, arguments, kept, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(module, name, raising(KeyboardInterrupt, 1)(getattr(module, name)))
    command = {comparison: "compare"}.get(module, module.__name__.rpartition(".")[2])
    file = tmp_path / "found.json"
    assert cli.main([command, *TEXT, *arguments, "--json", str(file)]) == cli.INTERRUPTED
    *found, last = capsys.readouterr().out.splitlines()
    written = json.loads(file.read_text())
    assert written["interrupted"] and len(written["missing"]) > 0
    assert written["notes"][0] == f"interrupted: not measured: {'; '.join(written['missing'])}"
    assert written["notes"][0] in found
    assert last.startswith("interrupted")
    # Of two generations one was made, which has nothing to be compared with.
    assert kept in "\n".join(found) and "greedy generation" not in "\n".join(found)


def test_ctrl_c_leaves_the_generations_of_the_demo(monkeypatch, capsys):
    monkeypatch.setattr(demo, "diverge", raising(KeyboardInterrupt, 0)(None))
    assert (
        cli.main(["demo", "--prompt", "Once upon a time", "--max-tokens", "2"]) == cli.INTERRUPTED
    )
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("KV cache, bytes") for line in out) and out[-1].startswith(
        "interrupted"
    )


def test_progress_without_a_terminal(monkeypatch, capsys):
    def run(args):
        with progress.progress(20, "turns") as bar:
            for _ in range(20):
                bar.update()
        return 0

    monkeypatch.setattr(status_command, "run", run)
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PAUSE", 0)
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"[-0-9]+ [:,0-9]+ +5% 1/20 .* turns.*", lines[1])
    assert "\r" not in "".join(lines)

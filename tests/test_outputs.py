"""What the commands show and write: whole, whatever comes in between."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tiny
from processes import ROOT, clean_environ

from mlx_turboquant_plugin import cli, interrupts, status_command
from mlx_turboquant_plugin.rules import SettingsError
from mlx_turboquant_plugin.tools import comparison
from mlx_turboquant_plugin.tools.output import as_json, check_distinct, show

MODEL = ["--model", str(tiny.PATHS["tiny-llama"]), "--text", str(tiny.TEXT)]
SHORT = ["--length", "64", "--presets", "small", "--beside", "--generate", "0"]


@pytest.mark.parametrize("second", ["out", "./out", "sub/../out", "link", "hard"])
def test_two_outputs_of_one_file_are_refused(second, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    if second == "hard":
        (tmp_path / "out").touch()
        os.link("out", "hard")
    os.symlink("out", "link")
    with pytest.raises(SettingsError, match=r"^--json is 'out' and --html is .*, the same file"):
        check_distinct(json="out", html=second)


def test_files_of_the_model_and_the_settings_are_no_outputs(tmp_path, monkeypatch):
    model, config = tmp_path / "model", tmp_path / "settings.toml"
    model.mkdir()
    (model / "config.json").touch()
    config.touch()
    monkeypatch.setenv("TURBOQUANT_CONFIG", str(config))
    monkeypatch.chdir(tmp_path)
    check_distinct("model", json="model/new.json", text="model/config.json")
    with pytest.raises(SettingsError, match=r"^--json is .*, a file of the model in --model"):
        check_distinct("model", json="./model/config.json")
    with pytest.raises(SettingsError, match=r"^--html is .* and TURBOQUANT_CONFIG is .*same file"):
        check_distinct("model", html="settings.toml")


def test_names_that_can_be_no_file_are_left_to_who_reads_them(tmp_path):
    (tmp_path / "out").touch()
    check_distinct(json=tmp_path / "out", text=tmp_path / (300 * "a"))


def test_outputs_that_several_may_share():
    check_distinct(json="/dev/null", html="/dev/null", text=None)
    check_distinct(json="a.json", html="a.html")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["compare", "--model", "x", "--json", "out", "--html", "out"], "--html"),
        (["drift", "--model", "x", "--json", "out", "--text", "out"], "--text"),
        (["truncate", "--model", "x", "--json", "out", "--tokens", "out"], "--tokens"),
        (["bench", "--model", "x", "--json", "out", "--plot", "out"], "--plot"),
    ],
)
def test_commands_refuse_before_they_measure(arguments, named, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == cli.BAD_SETTINGS
    assert f"--json is 'out' and {named} is 'out', the same file" in caplog.text


def test_one_output_that_fails_leaves_the_others(tmp_path, capsys):
    good, gone = tmp_path / "good.json", tmp_path / "gone" / "bad.json"
    with pytest.raises(SettingsError) as failed:
        show(["a line"], (gone, str), (good, lambda: as_json([1])), (gone / "worse", str))
    assert json.loads(good.read_text()) == [1] and capsys.readouterr().out == "a line\n"
    assert len(str(failed.value).splitlines()) == 2


def test_numbers_that_json_lacks_are_null():
    nan = float("nan")
    assert json.loads(as_json({"a": [nan, 1.5, (float("inf"),)]})) == {"a": [None, 1.5, [None]]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_results_are_written(number, tmp_path, capsys):
    file = tmp_path / "cuts.json"
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def text():
        os.kill(os.getpid(), number)
        return "whole"

    with interrupts.uninterrupted():
        show(["a line"], (file, text))
    assert file.read_text() == "whole"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_the_writing():
    """A pipe without a reader would hold the command for ever."""
    with pytest.raises(interrupts.Terminated), interrupts.uninterrupted():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    calls, lockstep = [], comparison.lockstep

    def terminated(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return lockstep(*args)

    monkeypatch.setattr(comparison, "lockstep", terminated)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    tasks = ["--tasks", "1", "--task-lengths", "300"]
    arguments = ["compare", *MODEL, *SHORT, "--windows", "3", *tasks, *files]
    assert cli.main(arguments) == cli.TERMINATED
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["interrupted"] and found["windows"] == 1
    assert found["missing"][0] == "2 of 3 windows"
    assert "1 of 1 prompts of the task words" in found["missing"]
    note = "interrupted: not measured: 2 of 3 windows"
    assert note in out and note in (tmp_path / "r.html").read_text()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("block", [interrupts.terminable, interrupts.uninterrupted])
def test_a_process_that_handles_sigterm_keeps_its_handler(block):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with block():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_before_anything_is_measured(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(status_command, "run", interrupted)
    assert cli.main(["status"]) == cli.INTERRUPTED
    assert capsys.readouterr().out == "interrupted: nothing was measured yet\n"


@pytest.mark.parametrize("arguments", [["status"], ["--help"], ["--version"]], ids=str)
@pytest.mark.parametrize(
    "redirection, said",
    [(">/dev/full", "can't be written (No space left on device)"), (">&-", "is closed")],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_fails_is_one_line(arguments, redirection, said):
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m"]
    done = subprocess.run(
        [*command, "mlx_turboquant_plugin", *arguments],
        capture_output=True,
        text=True,
        env=clean_environ(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == cli.UNWRITABLE
    [line] = done.stderr.splitlines()
    assert line.startswith("standard output ") and said in line


def test_results_are_written_where_standard_output_fails(tmp_path, monkeypatch, caplog):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Full())
    file = tmp_path / "r.json"
    arguments = ["compare", *MODEL, *SHORT, "--windows", "1", "--json", str(file)]
    assert cli.main(arguments) == cli.UNWRITABLE
    assert json.loads(file.read_text())["windows"] == 1
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    "option, value, named",
    [
        ("--json", "", "'' can't be written: it is no name"),
        ("--json", "file/below.json", "is a file: name a folder"),
        ("--text", "", "'' is no name of a file"),
        ("--tokens", "", "'' is no name of a file"),
    ],
)
def test_names_of_no_files(option, value, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cli.main(["compare", "--model", "x", option, value])
    assert named in capsys.readouterr().err

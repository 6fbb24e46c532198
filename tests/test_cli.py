"""What every subcommand does about Ctrl-C, closed pipes and places that are not there."""

import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT, clean_environ, run_python

from mlx_turboquant_plugin import __version__, cli, status_command

COMMAND = [sys.executable, "-m", "mlx_turboquant_plugin"]


def start(*arguments, **options):
    environ = clean_environ(PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
        **options,
    )  # fmt: skip


def test_the_package_can_be_run():
    assert run_python("-m", "mlx_turboquant_plugin", "--version").stdout.strip() == __version__


def test_ctrl_c_keeps_what_was_checked():
    with start("selftest", "--kernel", "eager") as process:
        # Lines come as they are made, though nobody watches.
        first = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
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

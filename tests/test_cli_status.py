"""``mlx_turboquant status``: its text, its JSON and its exit code."""

import json

import pytest
from processes import run_python, write_stand_in

from mlx_turboquant_plugin import cli

COMMAND = (
    "import sys; from mlx_turboquant_plugin import startup, cli; startup.main();"
    "sys.exit(cli.main(sys.argv[1:]))"
)


@pytest.fixture
def status(tmp_path):
    """Run the command beside a stand-in for mlx_lm."""

    def status(*arguments, hooks=("greeting_hooks:patch",), **variables):
        write_stand_in(tmp_path, hooks)
        return run_python(
            "-c", COMMAND, "status", *arguments, path=[tmp_path], check=False, **variables
        )

    status.folder = tmp_path
    return status


def test_off(status):
    done = status()
    assert done.returncode == 0
    assert "TurboQuant is off\n  because TURBOQUANT is not set" in done.stdout
    assert "mlx-lm" in done.stdout and "available" in done.stdout
    assert done.stderr == ""


def test_zero_is_off(status):
    done = status(TURBOQUANT="0")
    assert done.returncode == 0
    assert "because TURBOQUANT is '0'" in done.stdout


def test_on(status):
    path = status.folder / "settings.toml"
    path.write_text('[turboquant]\nsinks = 2\n[turboquant.models."qwen*"]\nsinks = 3\n')
    done = status("--json", TURBOQUANT="1", TURBOQUANT_KEY_BITS="2", TURBOQUANT_CONFIG=str(path))
    report = json.loads(done.stdout)
    assert report["active"] is True and report["reason"] is None
    assert "mlx_lm.models.greeting.greet" in report["patched"]
    assert report["settings"]["key_bits"] == {
        "value": 2,
        "source": "environment TURBOQUANT_KEY_BITS",
    }
    assert report["settings"]["sinks"]["source"] == f"file {path} [turboquant]"
    assert report["model_settings"]["qwen*"]["sinks"]["value"] == 3
    assert report["kernel"] in report["kernels"]
    assert report["device"] and all(report["versions"].values())


def test_on_as_text(status):
    done = status(TURBOQUANT="1", TURBOQUANT_PRESET="small")
    assert done.stdout.startswith("TurboQuant is active\n  but not in mlx_lm.perplexity, ")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["mlx_lm.models.greeting", "applied"] in lines
    assert ["value_bits", "3", "(preset", "small)"] in lines


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"TURBOQUANT": "yes"}, "TURBOQUANT is 'yes'"),
        ({"TURBOQUANT_BITS": "4"}, "TURBOQUANT_BITS"),
        ({"TURBOQUANT": "1", "TURBOQUANT_SINKS": "99"}, "TURBOQUANT_SINKS is 99"),
        ({"TURBOQUANT_KERNEL": "opencl"}, "TURBOQUANT_KERNEL is 'opencl'"),
    ],
)
def test_bad_settings(status, variables, message):
    done = status(**variables)
    assert done.returncode == 2
    assert "TurboQuant is off" in done.stdout and done.stdout.count(message) == 1
    assert done.stderr == ""


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_kernel_that_this_machine_lacks(status, switch):
    kernels = json.loads(status("--json").stdout)["kernels"]
    missing = next(name for name in ("metal", "cuda") if name not in kernels)
    done = status(TURBOQUANT=switch, TURBOQUANT_KERNEL=missing)
    assert done.returncode == 2
    assert missing in done.stdout and kernels[0] in done.stdout


def test_a_failed_hook_is_not_in_force(status):
    done = status(TURBOQUANT="1", hooks=("greeting_hooks:broken",))
    assert done.returncode == 1
    assert "failed: LookupError: no such layer" in done.stdout


def test_a_broken_mlx_lm_is_not_in_force(status):
    write_stand_in(status.folder)
    code = f"import sys; sys.modules['mlx_lm.models'] = None\n{COMMAND}"
    done = run_python("-c", code, "status", path=[status.folder], check=False, TURBOQUANT="1")
    assert done.returncode == 1
    assert "mlx_lm can't be imported" in done.stdout


def test_asked_for_without_the_start_up_file(status):
    write_stand_in(status.folder)
    code = COMMAND.replace("startup.main()", "startup.withdraw()")
    done = run_python("-c", code, "status", path=[status.folder], check=False, TURBOQUANT="1")
    assert done.returncode == 1
    assert "start-up file" in done.stdout


def test_arguments_are_checked(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["no-such-command"])
    assert exit.value.code == 2
    assert "status" in capsys.readouterr().err


def test_nothing_of_mlx_is_imported():
    code = (
        "import sys, mlx_turboquant_plugin.reporting as r; r.status(); "
        "print('mlx.core' in sys.modules)"
    )
    assert run_python("-c", code).stdout.strip() == "False"

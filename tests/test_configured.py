"""What the environment and the settings file do to commands that measure presets."""

import json

import pytest
import tiny
from processes import run_python

from mlx_turboquant_plugin import settings
from mlx_turboquant_plugin.cli import BAD_SETTINGS, main
from mlx_turboquant_plugin.rules import PRESETS, SettingsError
from mlx_turboquant_plugin.tools.arms import (
    BESIDE,
    CONFIGURED,
    PRESET_ARMS,
    configured,
    not_measured,
)
from mlx_turboquant_plugin.tools.runs import load_model

PATH = str(tiny.PATHS["tiny-llama"])
PRESETS_MEASURED = list(PRESET_ARMS.values())
ENVIRONMENT = {
    "KEY_BITS": "3",
    "VALUE_BITS": "2",
    "KEY_CODEC": "affine",
    "VALUE_CODEC": "affine",
    "WINDOW": "64",
    "SINKS": "8",
    "BALANCE": "0",
    "BYPASS": "bridge",
}
FILE = """
[turboquant]
sinks = 8
[turboquant.models."*tiny-llama"]
value_bits = 3
balance = false
"""


@pytest.fixture
def environment(monkeypatch):
    def environment(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"TURBOQUANT_{name}", value)

    return environment


@pytest.fixture(scope="module")
def model():
    return load_model(PATH).model


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_measured_as_it_is(name, environment):
    alone = settings.of_preset(name).shaping
    environment(PRESET="small", **ENVIRONMENT)
    with PRESET_ARMS[name].on():
        assert settings.in_force().general.shaping == alone
    default = settings.of_preset("default").shaping
    for bypass in ("identity", "bridge"):
        with BESIDE[bypass].on():
            assert settings.in_force().general.shaping == {**default, "bypass": bypass}


def test_nothing_is_configured_by_default(model, environment):
    assert configured(model, PRESETS_MEASURED) is None
    environment(KERNEL="eager", INVARIANT="1", PRESET="small")
    assert configured(model, PRESETS_MEASURED) is None
    assert configured(model, [PRESET_ARMS["default"]])[1] == "preset small (environment)"


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_each_setting_makes_an_arm(name, model, environment):
    environment(**{name: ENVIRONMENT[name]})
    arm, stated = configured(model, PRESETS_MEASURED)
    assert stated == f"{name.lower()} {ENVIRONMENT[name]} (environment)"
    with arm.on():
        assert settings.in_force().general.shaping != settings.of_preset("default").shaping
        assert settings.in_force().general.invariant


def test_the_table_of_a_model_counts(model, environment, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(FILE)
    environment(CONFIG=str(path))
    arm, stated = configured(model, PRESETS_MEASURED)
    assert arm.settings["value_bits"] == 3 and arm.settings["sinks"] == 8
    assert stated == (
        f'value_bits 3, balance 0 (file {path} [turboquant.models."*tiny-llama"]), '
        f"sinks 8 (file {path} [turboquant])"
    )
    [note] = not_measured(model, PRESET_ARMS["default"].settings)
    assert note == f"not in force here, but in compare: {stated}"
    [note] = not_measured(model, {**arm.settings, "value_bits": 4})
    assert "value_bits 3" in note and "sinks" not in note and "balance" not in note
    environment(KEY_BITS="4,3")
    with pytest.raises(SettingsError, match=r"environment TURBOQUANT_KEY_BITS.* has 2 numbers"):
        configured(model, PRESETS_MEASURED)


def test_compare_measures_it(environment, tmp_path, capsys):
    environment(KEY_BITS="4,4,3,3", SINKS="64")
    arguments = ["compare", "--model", PATH, "--text", str(tiny.TEXT), "--windows", "1"]
    arguments += ["--length", "64", "--presets", "small", "--beside", "mlx-lm-4bit"]
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main([*arguments, "--generate", "0", *files]) == 0
    note = "configured: key_bits 4,4,3,3, sinks 64 (environment)"
    found = json.loads((tmp_path / "r.json").read_text())
    assert note in capsys.readouterr().out.splitlines()
    assert note in found["notes"] and note in (tmp_path / "r.html").read_text()
    small, own, theirs = found["results"]
    assert (small["name"], own["name"], own["bits"]) == ("small", CONFIGURED, "4,3/4")
    assert small["settings"]["sinks"] == 4 and small["settings"]["key_bits"] == 4
    assert own["settings"]["sinks"] == 64 and own["settings"]["key_bits"] == [4, 4, 3, 3]
    assert theirs["settings"] == {"kv_bits": 4, "kv_group_size": 64}
    assert found["exact"]["settings"] == {}


@pytest.mark.parametrize(
    "arguments",
    [["drift", "--length", "240"], ["truncate", "--length", "400", "--at", "9", "--remove", "1"]],
    ids=str,
)
def test_commands_of_one_preset_say_what_is_not_in_force(arguments, environment, tmp_path, capsys):
    environment(SINKS="64")
    path = tmp_path / "found.json"
    files = ["--model", PATH, "--text", str(tiny.TEXT), "--json", str(path)]
    assert main([*arguments, *files]) == 0
    found = json.loads(path.read_text())
    assert found["notes"] == ["not in force here, but in compare: sinks 64 (environment)"]
    assert found["notes"][0] in capsys.readouterr().out.splitlines()
    assert found["settings"]["sinks"] == 4 and not found["interrupted"]


def test_demo_and_estimate_say_what_is_in_force(environment, capsys):
    environment(SINKS="64")
    assert main(["demo", "--model", PATH, "--prompt", "Once", "--max-tokens", "1"]) == 0
    assert "configured: sinks 64 (environment)" in capsys.readouterr().out.splitlines()
    assert main(["estimate", "--model", PATH, "--memory", "1GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "configured: sinks 64 (environment)" in lines
    rows = {line.split()[0]: line.split()[3:5] for line in lines if "x)" in line}
    assert rows["default"] != rows[CONFIGURED]


@pytest.mark.parametrize("command", ["compare", "drift", "truncate", "demo", "bench"])
@pytest.mark.parametrize("pattern", ["llama", "*tiny-llama"])
def test_models_that_are_opted_out_are_refused(command, pattern, environment, caplog):
    environment(OPT_OUT=f"x,{pattern}")
    assert main([command, "--model", PATH]) == BAD_SETTINGS
    [record] = caplog.records
    start = f"opt_out (environment TURBOQUANT_OPT_OUT) is 'x,{pattern}', and {pattern!r} leaves out"
    assert record.getMessage().startswith(start)


def test_bad_settings_are_said_once():
    code = (
        "import sys; from mlx_turboquant_plugin import startup, cli; startup.main();"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = run_python("-c", code, "compare", "--model", PATH, check=False, TURBOQUANT="foo")
    assert done.returncode == BAD_SETTINGS
    assert done.stderr.count("TURBOQUANT is 'foo'") == 1


def test_what_an_error_says_is_not_logged_besides():
    code = (
        "import tiny_models\n"
        "from mlx_turboquant_plugin.tools.runs import *\n"
        "with compressed():\n"
        "    try: compressed_prompt_cache(tiny_models.build('mamba'))\n"
        "    except SettingsError as error: print(error)"
    )
    done = run_python("-c", code, path=[tiny.ROOT / "tests"])
    assert "mamba runs uncompressed" in done.stdout and "uncompressed" not in done.stderr

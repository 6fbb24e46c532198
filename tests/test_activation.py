"""enable() and disable(): import orders, restoring, failures, other people's hooks."""

import importlib.metadata
import tomllib

import pytest
from processes import ROOT, run_python, write_stand_in, write_tree

from mlx_turboquant_plugin import compatibility

PRELUDE = "import sys, mlx_turboquant_plugin as plugin\n"
INSTALLED = any(importlib.metadata.distributions(name="mlx-turboquant-plugin"))


@pytest.fixture
def run(tmp_path):
    """Run code beside a stand-in for mlx_lm and return what it printed."""

    def run(code, hooks=("greeting_hooks:patch",), **variables):
        write_stand_in(tmp_path, hooks)
        return run_python("-c", PRELUDE + code, path=[tmp_path], **variables)

    run.folder = tmp_path
    return run


@pytest.mark.parametrize(
    "code",
    [
        "plugin.enable(); import mlx_lm",
        "import mlx_lm; plugin.enable()",
        "import mlx_lm.models; plugin.enable(); import mlx_lm.models.greeting",
    ],
)
def test_import_orders(run, code):
    end = "\nprint(sys.modules['mlx_lm.models.greeting'].greet())"
    assert run(code + end).stdout.split() == ["plain+"]


def test_a_third_party_entry_point_is_reported(run):
    code = """
plugin.enable()
def outcome():
    return [h["outcome"] for h in plugin.status().hooks if h["module"] == "mlx_lm.models.greeting"]
print(outcome())
import mlx_lm
print(outcome(), plugin.status().patched)
"""
    assert run(code).stdout.splitlines() == [
        "['waiting']",
        "['applied'] ['mlx_lm.models.greeting.greet']",
    ]


def test_enable_imports_no_mlx_lm():
    # With the real mlx_lm: a hook or a kernel might import it by mistake.
    code = PRELUDE + (
        "from importlib import metadata\n"
        "point = metadata.EntryPoint('mlx_lm.utils', 'os:fspath', 'mlx_turboquant_plugin')\n"
        "from mlx_turboquant_plugin import hooking\n"
        "hooking.entry_points = lambda group: [point]\n"
        "plugin.enable()\n"
        "print(plugin.status().active, [m for m in sys.modules if m.startswith('mlx_lm')])"
    )
    assert run_python("-c", code).stdout.split() == ["True", "[]"]


def test_disable_restores(run):
    code = """
import mlx_lm.models.greeting as greeting
original = greeting.greet
plugin.enable()
held = greeting.greet
print(held is original, held())
plugin.disable()
print(greeting.greet is original, held(), plugin.status().patched, plugin.status().reason)
plugin.disable()
"""
    assert run(code).stdout.splitlines() == [
        "False plain+",
        "True plain [] disable() was called",
    ]


def test_off_and_on_again(run):
    code = """
import greeting_hooks
plugin.enable(); plugin.disable()
import mlx_lm.models.greeting as greeting
print(greeting.greet(), len(greeting_hooks.calls))
for _ in range(2):
    plugin.enable()
    print(greeting.greet(), len(greeting_hooks.calls))
    plugin.disable()
del sys.modules["mlx_lm.models.greeting"]
plugin.enable(); plugin.disable(); plugin.enable()
import mlx_lm.models.greeting as greeting
print(greeting.greet(), len(greeting_hooks.calls))
"""
    assert run(code).stdout.splitlines() == ["plain 0", "plain+ 1", "plain+ 2", "plain+ 3"]


def test_a_second_enable_warns_and_changes_nothing(run):
    done = run(
        "import mlx_lm; plugin.enable(sinks=1); plugin.enable(sinks=2)\n"
        "from mlx_turboquant_plugin import settings\n"
        "print(mlx_lm.models.greeting.greet(), settings.in_force().general.sinks)"
    )
    assert done.stdout.split() == ["plain+", "1"]
    assert "on already" in done.stderr


def test_by_hand_wins_over_the_environment(run):
    start = "from mlx_turboquant_plugin import startup; startup.main()\n"
    end = "\nimport mlx_lm; print(mlx_lm.models.greeting.greet())"
    off = run(start + "plugin.disable()" + end, TURBOQUANT="1")
    on = run(start + "plugin.enable()" + end, TURBOQUANT="1")
    assert (off.stdout.split(), on.stdout.split()) == (["plain"], ["plain+"])
    assert on.stderr == ""


def test_a_failing_hook_breaks_neither_the_import_nor_other_hooks(run):
    hooks = ("greeting_hooks:broken", "no_such_package:patch", "greeting_hooks:patch")
    done = run(
        "plugin.enable(); import mlx_lm; print(mlx_lm.models.greeting.greet())\n"
        "print(sum(h['outcome'].startswith('failed') for h in plugin.status().hooks))",
        hooks,
    )
    assert done.stdout.split() == ["plain+", "2"]
    errors = [line for line in done.stderr.splitlines() if "mlx_lm.models.greeting" in line]
    assert len(errors) == 2
    assert "LookupError: no such layer" in done.stderr
    assert "No module named 'no_such_package'" in done.stderr


REFUSED = """
try:
    plugin.enable({})
except Exception as error:
    print(type(error).__name__, error)
import mlx_lm
print(mlx_lm.models.greeting.greet(), plugin.status().active, plugin.status().patched)
"""


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("key_bits=7", "SettingsError key_bits in enable() is 7"),
        ("kernel='metal' if sys.platform != 'darwin' else 'cuda'", "SettingsError"),
        ("speed=11", "SettingsError unknown setting speed"),
    ],
)
def test_bad_settings_patch_nothing(run, arguments, message):
    first, second = run(REFUSED.format(arguments)).stdout.splitlines()
    assert first.startswith(message)
    assert second == "plain False []"


@pytest.mark.parametrize("version", ["0.31.3", "0.33.0", "1.0"])
def test_an_unsupported_version_patches_nothing(run, version):
    metadata = {"mlx_lm-9.dist-info/METADATA": f"Name: mlx-lm\nVersion: {version}\n"}
    write_tree(run.folder, metadata)
    first, second = run(REFUSED.format("")).stdout.splitlines()
    assert first.startswith(f"RuntimeError mlx-lm {version} is installed")
    assert "mlx-lm>=0.32.0,<0.33" in first
    assert second == "plain False []"
    start = "from mlx_turboquant_plugin import startup; startup.main(); import mlx_lm\n"
    done = run(start + "print(plugin.status().reason)", TURBOQUANT="1")
    assert f"mlx-lm {version} is installed" in done.stdout
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "versions, problem",
    [
        ({"mlx-lm": "0.32.0", "mlx": "0.32.2"}, None),
        ({"mlx-lm": "0.32.9.post1", "mlx": "0.32.10"}, None),
        ({"mlx-lm": "0.32", "mlx": "0.32.2"}, None),
        ({"mlx-lm": "0.33", "mlx": "0.32.2"}, "mlx-lm 0.33 is installed"),
        ({"mlx-lm": "0.32.2", "mlx": "0.32.1"}, "mlx 0.32.1 is installed"),
        ({"mlx-lm": "0.33.0.dev1", "mlx": "0.32.4"}, "mlx-lm 0.33.0.dev1 is installed"),
        ({"mlx-lm": "0.32.2", "mlx": None}, "mlx is not installed: pip install"),
    ],
)
def test_supported_versions(monkeypatch, versions, problem):
    monkeypatch.setattr(compatibility, "installed_version", versions.get)
    found = compatibility.check()
    assert found is None if problem is None else found.startswith(problem)


def test_supported_versions_agree_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {f"{n}>={a},<{b}" for n, (a, b) in compatibility.SUPPORTED.items()}
    assert ranges <= set(project["dependencies"])
    first, end = compatibility.SUPPORTED["mlx"]
    for extra in ("cpu", "cuda"):
        [requirement] = project["optional-dependencies"][extra]
        assert requirement.endswith(f"]>={first},<{end}")


def test_the_log(run):
    code = (
        "import logging; logging.basicConfig()\n"
        "plugin.enable(); plugin.disable(); plugin.enable()\n"
        "logging.getLogger('mlx_turboquant_plugin').warning('one line')\n"
        "plugin.disable(); logging.getLogger('mlx_turboquant_plugin').info('no line')"
    )
    quiet, chatty = run(code).stderr, run(code, TURBOQUANT_LOG="INFO").stderr
    assert quiet.splitlines() == ["WARNING:mlx_turboquant_plugin:one line"]
    assert chatty.count("TurboQuant is on") == 2
    assert chatty.count("one line") == 1 and "no line" not in chatty


@pytest.mark.skipif(not INSTALLED, reason="the plugin's own entry points need pip install")
@pytest.mark.parametrize("first", ["plugin.enable()", "import mlx_lm"])
def test_the_real_mlx_lm(first):
    code = (
        PRELUDE
        + f"""
{first}
import mlx_lm, mlx_lm.models.qwen2, mlx_lm.models.qwen3, mlx_lm.models.llama
if not plugin.status().active:
    plugin.enable()
outcomes = [
    {{h["outcome"] for h in plugin.status().hooks if (h["module"] in sys.modules) is loaded}}
    for loaded in (True, False)
]
patched = plugin.status().patched
cache = mlx_lm.models.cache
print(outcomes, "mlx_lm.models.cache.make_prompt_cache" in patched)
print(hasattr(cache.make_prompt_cache, "__wrapped__"))
plugin.disable()
print(hasattr(cache.make_prompt_cache, "__wrapped__"))
for module in [m for n, m in sys.modules.items() if n.startswith("mlx_lm")]:
    assert not hasattr(getattr(module, "scaled_dot_product_attention", None), "__wrapped__")
"""
    )
    lines = run_python("-c", code).stdout.splitlines()
    assert lines == ["[{'applied'}, {'waiting'}] True", "True", "False"]


@pytest.mark.skipif(not INSTALLED, reason="hooks are found in the installed package")
@pytest.mark.parametrize("first", ["cache", "attention.dispatch", "tools.compare"])
def test_any_module_can_be_imported_first(first):
    code = f"""
import mlx_turboquant_plugin.{first}
import mlx_turboquant_plugin
print(mlx_turboquant_plugin.status().patched)
"""
    result = run_python("-c", code, TURBOQUANT="1")
    assert result.stderr == ""
    assert "mlx_lm.models.cache.make_prompt_cache" in result.stdout

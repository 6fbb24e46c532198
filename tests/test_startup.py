"""The start-up line: nothing when off, one finder that waits for mlx_lm when on."""

import timeit

import pytest
from processes import ROOT, run_python, write_stand_in, write_tree

COUNT = (
    "import sys; from mlx_turboquant_plugin import startup; startup.main(); startup.main();"
    "print(sum(type(f).__module__ == startup.__name__ for f in sys.meta_path))"
)


@pytest.fixture
def stand_in(tmp_path):
    write_stand_in(tmp_path)
    return tmp_path


def start(code, path, turboquant="1"):
    """Run code after the start-up function, as a .pth file would have it."""
    prelude = "from mlx_turboquant_plugin import startup; startup.main()\n"
    return run_python("-c", prelude + code, path=[path], TURBOQUANT=turboquant)


@pytest.mark.parametrize("value, finders", [(None, 0), ("", 0), ("0", 0), ("1", 1)])
def test_one_finder_only_when_on(value, finders):
    variables = {} if value is None else {"TURBOQUANT": value}
    assert run_python("-c", COUNT, **variables).stdout.strip() == str(finders)


def test_start_up_imports_nothing_else():
    code = (
        "import os, sys; before = set(sys.modules)\n"
        "from mlx_turboquant_plugin import startup; startup.main()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    # -S: an installed start-up file would have imported both already.
    loaded = run_python("-S", "-c", code, TURBOQUANT="1").stdout.split()
    assert loaded == ["mlx_turboquant_plugin", "mlx_turboquant_plugin.startup"]


def test_the_pth_line_costs_under_a_millisecond_when_off(monkeypatch):
    monkeypatch.delenv("TURBOQUANT", raising=False)
    [line] = (ROOT / "startup/mlx_turboquant_plugin_startup.pth").read_text().splitlines()
    assert line.startswith("import ")  # else site takes it for a path
    assert min(timeit.repeat(lambda: exec(line), number=1, repeat=5)) < 1e-3


def test_importing_the_package_is_cheap():
    code = (
        "import sys, mlx_turboquant_plugin as p; p.__version__\n"
        "print(*{'mlx', 'mlx_lm', 'wrapt', 'logging'} & set(sys.modules))"
    )
    assert run_python("-c", code).stdout.split() == []


def test_unknown_public_name():
    code = "import mlx_turboquant_plugin as p; print(hasattr(p, 'enabel'), hasattr(p, 'enable'))"
    assert run_python("-c", code).stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "code",
    [
        "import mlx_lm; print(mlx_lm.models.greeting.greet())",
        "import mlx_lm.models.greeting as g; print(g.greet())",
        "from mlx_lm.models.greeting import greet; print(greet())",
        "import runpy; runpy.run_module('mlx_lm', run_name='__main__')",
    ],
)
def test_every_way_to_import(code, stand_in):
    end = "\nprint(startup.waiting())"
    assert start(code + end, stand_in).stdout.split() == ["plain+", "False"]
    assert start(code + end, stand_in, "0").stdout.split() == ["plain", "False"]


def test_modules_keep_their_import_metadata(stand_in):
    code = (
        "import mlx_lm, mlx_lm.models.greeting as g\n"
        "print([(m.__name__, m.__file__, m.__spec__.origin, type(m.__loader__).__name__,\n"
        "        type(m.__spec__.loader).__name__, m.__package__) for m in (mlx_lm, g)])"
    )
    assert start(code, stand_in).stdout == start(code, stand_in, "0").stdout


@pytest.mark.parametrize("value", ["1", "yes"])
def test_the_next_finder_is_not_skipped(stand_in, value):
    code = """
import sys
class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx_lm":
            print("asked")
sys.meta_path.insert(1, Recorder())
import mlx_lm
"""
    assert "asked" in start(code, stand_in, value).stdout


def test_a_hook_of_mlx_lm_itself_is_called(stand_in):
    points = stand_in / "greeting_hooks-1.0.dist-info/entry_points.txt"
    points.write_text("[mlx_turboquant_plugin]\nmlx_lm = builtins:print\n")
    assert "<module 'mlx_lm'" in start("import mlx_lm", stand_in).stdout


def test_a_missing_mlx_lm_is_missing_as_usual():
    code = (
        "startup.TARGET = 'mlx_lm_that_is_not_there'\n"
        "try:\n    import mlx_lm_that_is_not_there\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = start(code, ROOT)
    assert done.stdout.strip() == "No module named 'mlx_lm_that_is_not_there'"


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"TURBOQUANT": "yes"}, "TURBOQUANT is 'yes'; allowed is 1 (on) or 0 (off)"),
        ({"TURBOQUANT": "1", "TURBOQUANT_KEY_BITS": "7"}, "TURBOQUANT_KEY_BITS is 7"),
    ],
)
def test_bad_settings_are_one_error_and_off(variables, message, stand_in):
    code = (
        "from mlx_turboquant_plugin import startup; startup.main()\n"
        "import mlx_lm; print(mlx_lm.models.greeting.greet())"
    )
    done = run_python("-c", code, path=[stand_in], **variables)
    assert done.stdout.split() == ["plain"]
    [line] = done.stderr.splitlines()
    assert line.startswith("TurboQuant is off: ") and message in line


def test_bad_settings_are_silent_without_mlx_lm():
    code = "from mlx_turboquant_plugin import startup; startup.main(); import json"
    assert run_python("-c", code, TURBOQUANT="yes").stderr == ""


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "SyntaxError"])
@pytest.mark.parametrize("broken", ["wrapt", "mlx/core"])
def test_a_broken_dependency_leaves_mlx_lm_alone(broken, error, stand_in):
    package = {"mlx/__init__.py": ""} if "/" in broken else {}
    write_tree(stand_in, {**package, f"{broken}.py": f"raise {error}('it is broken')\n"})
    done = start("import mlx_lm; print(mlx_lm.models.greeting.greet())", stand_in)
    assert done.stdout.split() == ["plain"]
    assert "TurboQuant is off" in done.stderr and "it is broken" in done.stderr


@pytest.mark.parametrize("first, then", [("mlx_vlm", "mlx_lm"), ("mlx_lm", "mlx_vlm")])
def test_a_package_with_caches_of_its_own_says_so(first, then, stand_in):
    """mlx_vlm has its own models and caches, and need not import mlx_lm."""
    write_tree(stand_in, {"mlx_vlm/__init__.py": ""})
    code = f"import {first}, {then}; print(mlx_lm.models.greeting.greet())"
    done = start(code, stand_in)
    assert done.stdout.strip() == "plain+"
    assert done.stderr.count("mlx_vlm has models and caches of its own") == 1


def test_a_package_with_caches_of_its_own_says_nothing_when_off(stand_in):
    write_tree(stand_in, {"mlx_vlm/__init__.py": ""})
    assert start("import mlx_vlm", stand_in, "0").stderr == ""
    assert "mlx_vlm has" in start("import mlx_vlm", stand_in).stderr

"""A wheel and an editable install: what they contain, activate and leave behind."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, run, write_tree

import mlx_turboquant_plugin

STARTUP = ["mlx_turboquant_plugin_startup.pth", "mlx_turboquant_plugin_startup.start"]
NO_INDEX = "No matching distribution found for hatchling"
WAITING = "import sys; print([type(f).__module__ for f in sys.meta_path])"


class Environment:
    """A fresh virtual environment that also sees this one's libraries."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(
            sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        )
        # Plain path lines: start-up files that lie there are not run again.
        parents = [path for path in sys.path if Path(path).name == "site-packages"]
        (self.site / "parents.pth").write_text("\n".join(parents) + "\n")

    def pip(self, *arguments):
        done = run([self.python, "-m", "pip", *arguments], check=False)
        if NO_INDEX in done.stderr:
            pytest.skip("building needs hatchling from a package index")
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments, **variables):
        return run([self.python, *arguments], **variables)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mlx is not on Windows")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    builder = Environment(tmp_path_factory.mktemp("builder"))
    builder.pip("wheel", "-q", "--no-deps", "--wheel-dir", folder, ROOT)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp(request.param))
    before = sorted(p.name for p in environment.site.iterdir())
    target = ["-e", ROOT] if request.param == "editable" else [request.getfixturevalue("wheel")]
    # The parent may hold the same version; it must neither satisfy pip nor be touched.
    environment.pip("install", "-q", "--no-deps", "--ignore-installed", *target)
    yield environment
    environment.pip("uninstall", "-q", "-y", "mlx-turboquant-plugin")
    assert sorted(p.name for p in environment.site.iterdir()) == before


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    source = ROOT / "mlx_turboquant_plugin"
    shipped = [
        str(path.relative_to(ROOT))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert set(shipped) <= set(names)
    assert [name for name in names if "/" not in name] == STARTUP
    assert not [name for name in names if name.startswith("tests/")]
    assert f"-{mlx_turboquant_plugin.__version__}-" in wheel.name


def test_start_up_files_lie_in_site_packages(installed):
    names = {path.name for path in installed.site.iterdir()}
    assert set(STARTUP) <= names
    text = (installed.site / STARTUP[1]).read_text()
    assert text == "mlx_turboquant_plugin.startup:main\n"


@pytest.mark.parametrize("value, waiting", [("1", 1), ("0", 0), ("", 0)])
def test_installing_is_enough(installed, value, waiting):
    found = installed.run("-c", WAITING, TURBOQUANT=value).stdout
    assert found.count("mlx_turboquant_plugin.startup") == waiting


def test_off_adds_nothing_to_start_up(installed):
    done = installed.run("-X", "importtime", "-c", "pass")
    assert "site" in done.stderr and "turboquant" not in done.stderr


def test_mlx_lm_is_patched_as_a_script_is_run(installed, tmp_path):
    job = (
        "import mlx_lm, mlx_turboquant_plugin\n"
        "print(*mlx_turboquant_plugin.status().patched, sep='\\n')\n"
    )
    write_tree(tmp_path, {"job.py": job})
    for value, patched in (("1", True), ("0", False)):
        names = installed.run(tmp_path / "job.py", TURBOQUANT=value).stdout.split()
        assert ("mlx_lm.models.cache.make_prompt_cache" in names) is patched


def test_the_command_is_installed(installed):
    done = run([installed.python.parent / "mlx_turboquant", "--version"])
    assert done.stdout.strip() == mlx_turboquant_plugin.__version__


def test_the_line_that_turns_on_a_folder_on_the_path(wheel, tmp_path):
    """Python reads no .pth files there, and so it stays off; ``status`` says what to do."""
    environment, folder = Environment(tmp_path / "venv"), tmp_path / "target"
    environment.pip("install", "-q", "--no-deps", "--target", folder, wheel)
    command = [folder / "bin" / "mlx_turboquant", "status"]
    before = run(command, check=False, PYTHONPATH=str(folder), TURBOQUANT="1")
    assert before.returncode == 1
    [line] = re.findall(r"echo '.*' >> \S*(?=,)", before.stdout)
    subprocess.run(line, shell=True, check=True)
    after = run(command, PYTHONPATH=str(folder), TURBOQUANT="1")
    assert after.stdout.startswith("TurboQuant is active\n")

"""Run Python in a fresh process: what tests of import state need."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def clean_environ(**variables):
    """This environment without TURBOQUANT settings, plus some variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TURBOQUANT")}
    return {**kept, **variables}


def run(command, check=True, **variables):
    """Run a command and capture its output as text."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean_environ(**variables)
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_python(*arguments, path=(), **options):
    """Run this Python with ``path`` and the repository in front of its path."""
    front = os.pathsep.join(map(str, [*path, ROOT]))
    return run([sys.executable, *arguments], PYTHONPATH=front, **options)


def write_tree(root, files):
    """Write files, given as relative path -> text."""
    for name, text in files.items():
        target = Path(root) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def write_stand_in(root, hooks=("greeting_hooks:patch",)):
    """A tiny mlx_lm, and a third-party package with hooks for its one model.

    The stand-in has none of the modules that the plugin's own hooks wait for.
    """
    points = "\n".join(f"mlx_lm.models.greeting = {hook}" for hook in hooks)
    write_tree(
        root,
        {
            "mlx_lm/__init__.py": "from .models import greeting\n",
            "mlx_lm/__main__.py": "from .models import greeting\nprint(greeting.greet())\n",
            "mlx_lm/models/__init__.py": "",
            "mlx_lm/models/greeting.py": "def greet():\n    return 'plain'\n",
            "greeting_hooks.py": (
                "from mlx_turboquant_plugin import patching\n"
                "calls = []\n"
                "def patch(module):\n"
                "    calls.append(module)\n"
                "    patching.wrap(module, 'greet', lambda w, i, a, k: w(*a, **k) + '+')\n"
                "def broken(module):\n"
                "    patching.wrap(module, 'greet', lambda w, i, a, k: 'half-patched')\n"
                "    raise LookupError('no such layer')\n"
            ),
            "greeting_hooks-1.0.dist-info/METADATA": "Name: greeting-hooks\nVersion: 1.0\n",
            "greeting_hooks-1.0.dist-info/entry_points.txt": (
                f"[mlx_turboquant_plugin]\n{points}\n"
            ),
        },
    )

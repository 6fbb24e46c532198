"""Imports go one way: who changes a layer needs to know those below it, and none above."""

import ast
from graphlib import TopologicalSorter

import pytest
from processes import ROOT

PACKAGE = "mlx_turboquant_plugin"

# From top to bottom: a module imports from its own row and from those below. Imports in functions
# count, too. What is looked up by name does not: the commands in cli, the public names in
# __init__, and whatever an entry point names.
LAYERS = [
    ("__main__", "cli", "stdout", "status_command", "building"),
    ("tools",),
    ("reporting", "startup"),
    ("activation",),
    ("serving",),
    ("models", "integration"),
    ("attention",),
    ("cache",),
    ("backends",),
    ("codecs",),
    ("settings", "hooking", "compiling", "streams", "interrupts"),
    ("rules", "patching", "log", "per_thread", "cache_folder", "compatibility", "reference"),
    ("__init__",),
]


def imported(source, module):
    """The modules of the package, dotted, that the source of ``module`` imports names from.

    ``from .a import b`` counts as ``a.b``: see :func:`graph`.
    """
    found = set()
    for node in _run(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = [PACKAGE, *module.split(".")][: -node.level or None] if node.level else []
            start = ".".join([*parents, *filter(None, [node.module])])
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{PACKAGE}.") for name in found if name.startswith(f"{PACKAGE}.")}


def _run(tree):
    """The nodes that Python runs: all but those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _run(node)


def graph():
    """Each module of the package, dotted, packages as ``name.__init__``: those it imports."""
    files = {
        ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path
        for path in (ROOT / PACKAGE).rglob("*.py")
    }

    def home(name):
        """The module that is imported for this name, which may be in it."""
        owner = name.rpartition(".")[0]
        choices = name, f"{name}.__init__", owner, f"{owner}.__init__".lstrip(".")
        return next(choice for choice in choices if choice in files)

    return {
        module: {home(name) for name in imported(path.read_text("utf-8"), module)} - {module}
        for module, path in files.items()
    }


def test_no_import_goes_up():
    rows = {name: row for row, names in enumerate(LAYERS) for name in names}
    upwards = {
        (module, other.split(".")[0])
        for module, others in graph().items()
        for other in others
        if rows[other.split(".")[0]] < rows[module.split(".")[0]]
    }
    assert not upwards


def test_no_modules_import_each_other():
    # CycleError names them.
    TopologicalSorter(graph()).prepare()


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import mlx_turboquant_plugin.log", {"log"}),
        ("from .. import log, settings", {"log", "settings"}),
        ("from . import compressed", {"cache.compressed"}),
        ("from .view import View", {"cache.view.View"}),
        ("from mlx_turboquant_plugin.codecs import kv_codec", {"codecs.kv_codec"}),
        ("def f():\n    from ..backends import backend", {"backends.backend"}),
        ("if TYPE_CHECKING:\n    from ..backends import backend", set()),
        ("import mlx.core", set()),
    ],
)
@pytest.mark.parametrize("module", ["cache.batch", "cache.__init__"])
def test_what_counts_as_an_import(source, expected, module):
    assert imported(source, module) == expected

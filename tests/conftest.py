import os
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

import mlx_turboquant_plugin
from mlx_turboquant_plugin import compiling
from mlx_turboquant_plugin.attention import function


def pytest_configure(config):
    """A folder for each of pytest-xdist's workers, for what MLX compiles, and one g++ for all.

    Before 0.32.4 MLX takes the library that another process is still writing for a finished one.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        tempfile.gettempdir()  # Python asks once, and so stays where it is.
        os.environ["TMPDIR"] = str(config.cache.mkdir(worker))
    elif sys.platform == "linux" and (compiler := shutil.which("g++")):
        built = tempfile.TemporaryDirectory()
        config.add_cleanup(built.cleanup)
        os.environ["REAL_GXX"], os.environ["BUILT_BY_GXX"] = compiler, built.name
        front = Path(__file__).parent / "gxx"
        os.environ["PATH"] = os.pathsep.join([str(front), os.environ["PATH"]])


@pytest.fixture(autouse=True, scope="session")
def functions_are_compiled_at_once():
    compiling.here()


@pytest.fixture(autouse=True, scope="session")
def statistics_are_kept_apart(tmp_path_factory):
    """Nobody's cache folder is written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def plugin_is_off_again():
    yield
    mlx_turboquant_plugin.disable()


@pytest.fixture(params=tiny.PATHS)
def tiny_model(request):
    """(model in fp32, 420 tokens of text (1, 420)): more than the window and the sinks."""
    model, tokenizer = tiny.load(request.param)
    return model, mx.array(tiny.text_tokens(tokenizer, 420))[None]


@pytest.fixture
def traced(monkeypatch):
    """A list that grows whenever a function of compiled attention is traced."""
    calls = []

    def noted(part):
        def call(*args):
            calls.append(part)
            return part(*args)

        return call

    # Each function but the first has one of them.
    for name in ("_masked", "_added"):
        monkeypatch.setattr(function, name, noted(getattr(function, name)))
    function.attention_functions.cache_clear()
    yield calls
    function.attention_functions.cache_clear()

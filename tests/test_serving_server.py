"""What a running mlx_lm.server gets from the plugin, its metrics among it."""

import gc
import sys
import weakref

from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache
from served_model import TEXT, InProcess, model_path, text_of  # noqa: F401
from server_process import Server

import mlx_turboquant_plugin


def test_without_settings_the_server_batches_as_ever(model_path, monkeypatch):
    mlx_turboquant_plugin.enable()
    with InProcess(model_path) as served:
        text_of(served.complete("A question"))
        assert type(served.generator.turboquant._generator()) is BatchGenerator
        assert 'turboquant_kernel{kernel="' in served.ask("GET", "/metrics?x=1")[1]
        assert served.ask("GET", "/nothing")[0] == 404
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        status, text = served.ask("GET", "/metrics")
        assert status == 501 and "pip install 'mlx-turboquant-plugin[server]'" in text
        # A server that goes on without compression is mlx-lm's own.
        mlx_turboquant_plugin.disable()
        assert served.ask("GET", "/metrics")[0] == 404
        text_of(served.complete("Another question"))


def test_a_server_that_has_stopped_holds_nothing(model_path):
    mlx_turboquant_plugin.enable(memory_budget="1GB")
    with InProcess(model_path) as served:
        served.complete(TEXT[:600])
        model = weakref.ref(served.generator.model_provider.model)
        assert model() is not None
    gc.collect()
    assert model() is None


def test_the_prompt_cache_of_another_program_is_left_alone(model_path, caplog):
    class Own(LRUPromptCache):
        pass

    mlx_turboquant_plugin.enable(memory_budget="1%")
    with InProcess(model_path, Own) as served:
        assert type(served.generator.prompt_cache) is Own
        text_of(served.complete("A question"))
        assert served.ask("GET", "/metrics")[0] == 404
    [line] = caplog.messages
    assert "prompt cache that is a Own, the settings memory_budget" in line


def test_the_server_that_python_m_runs(model_path, tmp_path):
    settings = {"TURBOQUANT": "1", "TURBOQUANT_MEMORY_BUDGET": "1MB"}
    with Server(model_path, tmp_path / "log", **settings) as server:
        assert server.get("/metrics")[0] == 200
        assert server.complete(TEXT)[0] == 413
        assert server.complete("Once")[0] == 200

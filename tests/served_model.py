"""A small model, prompts for it, and mlx_lm.server in this process."""

import argparse
import json
import threading
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer

import mlx.core as mx
import pytest
import tiny
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from server_process import save_fp32

NAME = "tiny-llama"
MODEL, TOKENIZER = tiny.load(NAME)
TOKENS = tiny.text_tokens(TOKENIZER, 1000)
TEXT = tiny.TEXT.read_text("utf-8")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_fp32(folder, NAME)
    return folder / NAME


class InProcess:
    """The server of a model in this process, which others can look into."""

    def __init__(self, model_path, prompt_cache=LRUPromptCache):
        arguments = argparse.Namespace(
            model=str(model_path), adapter_path=None, draft_model=None, num_draft_tokens=3,
            trust_remote_code=False, chat_template="", use_default_chat_template=False, temp=0.0,
            top_p=1.0, top_k=0, min_p=0.0, max_tokens=16, chat_template_args={}, pipeline=False,
            decode_concurrency=32, prompt_concurrency=8, prefill_step_size=512, kv_bits=None,
            kv_group_size=64, quantized_kv_start=0,
            prompt_cache_bytes=None, allowed_origins="*",
        )  # fmt: skip
        provider = server.ModelProvider(arguments)
        self.generator = server.ResponseGenerator(provider, prompt_cache(10))

        def handler(*args, **kwargs):
            return server.APIHandler(self.generator, *args, system_fingerprint="", **kwargs)

        # A queue for all clients, not the five of Python's.
        ThreadingHTTPServer.request_queue_size = 64
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self.generator.stop_and_join()

    def open(self, method, path, body=None):
        """A response that is to be read."""
        connection = HTTPConnection("127.0.0.1", self._server.server_port, timeout=120)
        connection.request(method, path, body and json.dumps(body))
        return connection.getresponse()

    def ask(self, method, path, body=None):
        """(status, text of the answer)."""
        response = self.open(method, path, body)
        return response.status, response.read().decode()

    def complete(self, prompt, max_tokens=16, **options):
        """(status, parsed answer)."""
        body = {"prompt": prompt, "max_tokens": max_tokens, **options}
        status, text = self.ask("POST", "/v1/completions", body)
        return status, json.loads(text)

    def metric(self, name):
        """A line of the page of metrics as a number."""
        [line] = [x for x in self.ask("GET", "/metrics")[1].splitlines() if x.startswith(name)]
        return float(line.split()[-1])


def text_of(answer):
    assert answer[0] == 200, answer
    return answer[1]["choices"][0]["text"]


def prompts(count, characters=1500):
    return [f"{31 * i} {TEXT[90 * i : 90 * i + characters - 60 * i]}" for i in range(count)]


def filled(count, tokens=TOKENS):
    """The caches of the first ``count`` tokens."""
    caches = make_prompt_cache(MODEL)
    MODEL(mx.array([tokens[:count]]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches

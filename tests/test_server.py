"""mlx_lm.server with compressed caches: many clients at once, and one after the other."""

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import mlx.core as mx
import mlx_lm
import pytest
import tiny
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import save_config, save_model
from processes import ROOT, clean_environ

import mlx_turboquant_plugin

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
TEXT = tiny.TEXT.read_text("utf-8")
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the shipped models in fp32: in bfloat16 rounding alone decides close choices."""
    folder = tmp_path_factory.mktemp("models")
    for name, original in tiny.PATHS.items():
        model, tokenizer, config = mlx_lm.load(str(original), return_config=True)
        model.set_dtype(mx.float32)
        save_model(folder / name, model)
        save_config({**config, "torch_dtype": "float32"}, folder / name / "config.json")
        tokenizer.save_pretrained(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def model_path(models):
    return models / "tiny-qwen3"


class Server:
    """The real server in a process of its own."""

    def __init__(self, model_path, log, *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [
            sys.executable,
            "-m",
            "mlx_lm.server",
            "--model",
            model_path,
            "--port",
            self.port,
        ]
        command += ["--chat-template", TEMPLATE, "--log-level", "DEBUG", *arguments]
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=out,
                stderr=out,
                env=clean_environ(PYTHONPATH=str(ROOT), **environment),
            )

    def __enter__(self):
        deadline = time.monotonic() + 120
        while True:
            try:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.log.read_text()) from None
            time.sleep(0.2)

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(30)

    def chat(self, messages, stop_after=None, **options):
        """The streamed answer and its usage; after ``stop_after`` chunks the client hangs up."""
        body = {
            **options,
            "messages": messages,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection, response = self._post("/v1/chat/completions", json.dumps(body))
        assert response.status == 200, response.read()
        text, usage, chunks = "", None, 0
        for line in response:
            if not line.startswith(b"data: ") or b"[DONE]" in line:
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            chunks += 1
            if chunks == stop_after:
                break
        connection.close()
        return text, usage

    def _post(self, path, body):
        # Python's HTTP server has a queue of five for new connections and drops the rest.
        for _ in range(100):
            connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                return connection, connection.getresponse()
            except ConnectionError:
                time.sleep(0.1)
        raise AssertionError("no connection")


def conversation(number, words):
    start = 97 * number % 2000
    return [{"role": "user", "content": f"{number} {TEXT[start : start + words]}"}]


# From a few words to more than the window of exact tokens.
CHATS = [conversation(i, 40 + 60 * (i % 16)) for i in range(32)]


def test_many_clients_at_once_get_what_each_gets_alone(model_path, tmp_path):
    with Server(model_path, tmp_path / "log", TURBOQUANT="1", TURBOQUANT_LOG="info") as server:
        with ThreadPoolExecutor(40) as pool:
            answers = [pool.submit(server.chat, chat) for chat in CHATS]
            hang_ups = [pool.submit(server.chat, chat, stop_after=3) for chat in CHATS[:8]]
            together = [answer.result() for answer in answers]
            for gone in hang_ups:
                gone.result()
        assert all(text for text, _ in together)
        alone = [server.chat(chat) for chat in CHATS[::4]]
        assert [text for text, _ in alone] == [text for text, _ in together[::4]]
        # A conversation that goes on finds its beginning in the prompt cache.
        longest, answer = CHATS[15], together[15][0]
        server.chat(longest)
        longer = [*longest, {"role": "assistant", "content": answer}, *conversation(50, 100)]
        _, usage = server.chat(longer)
        assert usage["prompt_tokens_details"]["cached_tokens"] > 200
        with Server(model_path, tmp_path / "log2", TURBOQUANT="1") as fresh:
            assert fresh.chat(longer)[0] == server.chat(longer)[0]
    log = (tmp_path / "log").read_text()
    assert "layers compressed" in log
    # Clients that hang up are the only errors there are.
    errors = set(re.findall(r"^(\w+(?:Error|Exception))\b", log, re.MULTILINE))
    assert errors <= {"BrokenPipeError", "ConnectionResetError"}
    assert "Prompt Cache:" in log


def test_models_are_switched(models, tmp_path):
    names = "tiny-qwen3", "tiny-qwen2", "tiny-llama", "tiny-qwen3"
    log = tmp_path / "log"
    with Server(models / names[0], log, TURBOQUANT="1", TURBOQUANT_LOG="info") as server:
        texts = [server.chat(CHATS[15], model=str(models / name))[0] for name in names]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    for kind in ("qwen2", "qwen3", "llama"):
        assert re.search(rf"{kind} .* layers compressed", log.read_text())


def test_a_draft_model_and_kv_bits_change_nothing(models, model_path, tmp_path):
    logs = tmp_path / "drafted", tmp_path / "log"
    options = "--draft-model", models / "tiny-llama", "--kv-bits", 4
    with Server(model_path, logs[0], *options, TURBOQUANT="1") as server:
        drafted = server.chat(CHATS[15])[0]
    with Server(model_path, logs[1], TURBOQUANT="1") as server:
        assert drafted == server.chat(CHATS[15])[0]
        server.chat(CHATS[1])
    drafted, log = (file.read_text() for file in logs)
    # In the server's own log, since nobody asked for one of the plugin's.
    assert drafted.count("kv_bits=4 is ignored") == 1 and "kv_bits" not in log
    said = (
        r"INFO - qwen3 .*: preset default, window 160, kernel \w+; KV cache \d\.\d+ times smaller"
    )
    assert len(re.findall(said, log)) == 1


def test_the_servers_prompt_cache_shares_counts_and_trims():
    model, tokenizer = tiny.load("tiny-qwen3")
    tokens = tiny.text_tokens(tokenizer, 700)
    # What is left of a prompt is read like the whole.
    mlx_turboquant_plugin.enable(invariant=True)
    _, caches = tiny.logits(model, mx.array([tokens]))
    store = LRUPromptCache()
    store.insert_cache("model", tokens, caches)
    assert store.nbytes == sum(cache.nbytes for cache in caches)
    exact = 2 * 700 * 2 * 128 * 4 * len(caches)
    assert store.nbytes < exact / 2
    # Another conversation with the same beginning gets a copy, cut to what they share.
    asked = tokens[:690] + [5, 6, 7]
    found, rest = store.fetch_nearest_cache("model", asked)
    assert rest == asked[690:]
    assert all(cache.offset == 690 for cache in found)
    assert all(cache.offset == 700 for cache in caches)
    ours, _ = tiny.logits(model, mx.array([rest]), found)
    expected, _ = tiny.logits(model, mx.array([asked]))
    assert tiny.mean_kl(expected[:, -3:], ours) < 1e-5

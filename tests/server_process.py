"""The real mlx_lm.server, and models that it can load."""

import json
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection

import mlx.core as mx
import mlx_lm
import tiny
from mlx_lm.utils import save_config, save_model
from processes import ROOT, clean_environ

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
MAX_TOKENS = 24


def save_fp32(folder, *names):
    """Save shipped models in fp32: in bfloat16 rounding alone decides close choices."""
    for name in names:
        model, tokenizer, config = mlx_lm.load(str(tiny.PATHS[name]), return_config=True)
        model.set_dtype(mx.float32)
        save_model(folder / name, model)
        save_config({**config, "torch_dtype": "float32"}, folder / name / "config.json")
        tokenizer.save_pretrained(str(folder / name))


class Server:
    """The real server in a process of its own.

    Args:
        program: what Python runs.
    """

    def __init__(self, model_path, log, *arguments, program=("-m", "mlx_lm.server"), **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [
            sys.executable,
            *program,
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
        connection, response = self.post("/v1/chat/completions", json.dumps(body))
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

    def get(self, path):
        """(status, text) of a page."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def complete(self, prompt, max_tokens=MAX_TOKENS):
        """(status, parsed answer) of a completion."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        _, response = self.post("/v1/completions", json.dumps(body))
        return response.status, json.loads(response.read())

    def post(self, path, body):
        # Python's HTTP server has a queue of five for new connections and drops the rest.
        for _ in range(100):
            connection = HTTPConnection("127.0.0.1", self.port, timeout=3600)
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                return connection, connection.getresponse()
            except ConnectionError:
                time.sleep(0.1)
        raise AssertionError("no connection")

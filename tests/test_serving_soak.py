"""A real server under load and under SIGKILL, with its bytes counted by itself."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from server_process import Server, save_fp32

PROGRAM = tiny.ROOT / "tests" / "audited_server.py"
TEXT = 6 * tiny.TEXT.read_text("utf-8")
BUDGET = 64_000_000
CLIENTS = 64
# A trim of so few tokens leaves no trace.
MAX_TOKENS = 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_fp32(folder, "tiny-llama")
    return folder / "tiny-llama"


@pytest.fixture
def start(model_path, tmp_path):
    def start(name, *arguments, **settings):
        audit = tmp_path / f"{name}.json"
        settings = {"TURBOQUANT": "1", "TURBOQUANT_INVARIANT": "1", **settings}
        log = tmp_path / f"{name}.log"
        return Server(model_path, log, *arguments, program=(PROGRAM, audit), **settings)

    return start


def prompts(count, least, most):
    """Of ``least`` to ``most`` tokens, evenly by their logarithm; none begins like another."""
    chosen = random.Random(5)
    found = []
    for index in range(count):
        tokens = int(least * (most / least) ** chosen.random())
        begin, characters = chosen.randrange(9000), 4 * tokens
        found.append(f"{7919 * index % 997} {TEXT[begin : begin + characters]}")
    return found


def texts(server, questions, clients):
    def ask(question):
        status, answer = server.complete(question, MAX_TOKENS)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, questions))


def test_64_clients_never_take_more_than_the_budget(start, tmp_path):
    questions = prompts(CLIENTS, 100, 4000)
    disk = f"{tmp_path / 'disk'}:200MB"
    budget = {"TURBOQUANT_MEMORY_BUDGET": str(BUDGET), "TURBOQUANT_DISK_CACHE": disk}
    with start("together", **budget) as server:
        together = texts(server, questions, CLIENTS)
        # Conversations that go on, some of which are on disk by now.
        longer = [f"{a}{b} And then" for a, b in zip(questions, together)][::4]
        together += texts(server, longer, CLIENTS)
        _, page = server.get("/metrics")
    most = json.loads((tmp_path / "together.json").read_text())
    assert 0.8 * BUDGET < most["nbytes"] <= BUDGET
    assert most["running"] > 8
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
    assert float(values['turboquant_prompt_cache_hits_total{source="disk"}']) > 0
    assert "Traceback" not in (tmp_path / "together.log").read_text()
    with start("alone") as server:
        sample = list(zip([*questions, *longer], together))[::5]
        assert texts(server, [a for a, _ in sample], 1) == [b for _, b in sample]


def test_a_server_that_is_killed_while_it_writes(start, tmp_path):
    folder = tmp_path / "disk"
    settings = {"TURBOQUANT_MEMORY_BUDGET": "3MB", "TURBOQUANT_DISK_CACHE": str(folder)}
    questions = prompts(4, 500, 1000)
    with start("killed", SLOW_DISK="1", **settings) as server:
        firsts = texts(server, questions[:3], 1)
        deadline = time.monotonic() + 60
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(server.post, "/v1/completions", json.dumps({"prompt": questions[3]}))
            while len(list(folder.glob("*/*.part.safetensors"))) == 0:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            server.process.kill()
            server.process.wait()
            last.exception()
    [_] = folder.glob("*/*.part.safetensors")
    whole = list(folder.glob("*/*-*.safetensors"))
    assert whole
    for _ in range(2):
        with start("again", **settings) as server:
            assert not list(folder.glob("*/*.part.safetensors"))
            assert texts(server, questions[:3], 1) == firsts
            _, page = server.get("/metrics")
        hits = [x for x in page.splitlines() if x.startswith("turboquant_prompt_cache_hits_total")]
        assert sum(float(x.split()[-1]) for x in hits if "disk" in x) >= 1
    # One file for each conversation: nothing piles up.
    assert len(list(folder.glob("*/*"))) <= 3

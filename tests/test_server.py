"""mlx_lm.server with compressed caches: many clients at once, and one after the other."""

import re
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models.cache import LRUPromptCache
from server_process import Server, save_fp32

import mlx_turboquant_plugin

TEXT = tiny.TEXT.read_text("utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_fp32(folder, *tiny.PATHS)
    return folder


@pytest.fixture(scope="module")
def model_path(models):
    return models / "tiny-qwen3"


def conversation(number, words):
    start = 97 * number % 2000
    return [{"role": "user", "content": f"{number} {TEXT[start : start + words]}"}]


# From a few words to more than the window of full-precision tokens.
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

"""The demo on a real model: one reading of a document, asked about exact and compressed."""

import copy
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..cache.parts import only_compressed
from ..reporting import Status, status
from .generation import Generation, common, generate, table, texts
from .runs import compressed, compressed_prompt_cache, prompt_cache

QUESTION = "What did the town grow rich from?"
# A CPU reads some 15 tokens of this model a second; the answer is in these.
PARAGRAPHS_ON_CPU = 3
CHUNK = 64


def ask(model: nn.Module, tokenizer: Any, document: str, max_tokens: int) -> Iterator[str]:
    """Ask a model about ``document``; the lines to show.

    Both runs continue from the same reading of the document. Nothing is compiled in advance:
    what the first run on a machine needs is built meanwhile, and a report says so.

    Raises:
        SettingsError: the model can't be compressed.
    """
    if mx.default_device().type == mx.cpu:
        document = "\n\n".join(document.split("\n\n")[:PARAGRAPHS_ON_CPU])
    prompt = _chat(tokenizer, f"{document}\n\n{QUESTION}")
    start = common(prompt, _chat(tokenizer, f"{document}\n\n"))
    with compressed(bypass=None):
        compressed_prompt_cache(model)
    caches = _read(model, mx.array(prompt[:start])[None])
    with compressed(bypass=None):
        ours_caches = _copied(caches, compressed_prompt_cache(model))
        _warm_up(model, tokenizer, prompt[start:], ours_caches)
        ours = generate(model, tokenizer, prompt[start:], max_tokens, ours_caches)
        snapshot = status()
    _warm_up(model, tokenizer, prompt[start:], caches)
    exact = generate(model, tokenizer, prompt[start:], max_tokens, caches)
    return _lines(snapshot, start, exact, ours, _token_bytes(caches), _code_bytes(ours_caches))


def _warm_up(model: nn.Module, tokenizer: Any, prompt: list[int], caches: list[Any]) -> None:
    """Do what is done once: read ``prompt`` and a token more, in copies of ``caches``."""
    # All of it: what it completes becomes codes, which is compiled, too.
    generate(model, tokenizer, prompt, 2, copy.deepcopy(caches))


def _chat(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def _read(model: nn.Module, tokens: mx.array) -> list[KVCache]:
    """Uncompressed caches that hold ``tokens`` (1, L)."""
    caches = prompt_cache(model)
    # On a CPU a stream is one thread: two chunks follow each other through the layers.
    streams = [mx.new_stream(mx.default_device()) for _ in range(2)]
    for index, start in enumerate(range(0, tokens.shape[1], CHUNK)):
        with mx.stream(streams[index % 2]):
            model(tokens[:, start : start + CHUNK], cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


def _copied(caches: list[KVCache], empty: list[Any]) -> list[Any]:
    """``empty`` caches, filled with what the others hold."""
    for cache, other in zip(caches, empty):
        other.update_and_fetch(*(x[..., : cache.offset, :] for x in cache.state[:2]))
    mx.eval([cache.state for cache in empty])
    return empty


def _token_bytes(caches: list[KVCache]) -> float:
    """Bytes of a token in all layers together."""
    states = (cache.state[:2] for cache in caches)
    return sum((keys.nbytes + values.nbytes) / keys.shape[2] for keys, values in states)


def _code_bytes(caches: list[Any]) -> float:
    """Bytes of a token that is compressed, in all layers together."""
    return sum(
        sum(x.nbytes for x in (*cache.key_codes, *cache.value_codes)) / cache.quantized
        for cache in only_compressed(caches)
    )


def _lines(
    snapshot: Status, read: int, exact: Generation, ours: Generation, token: float, code: float
) -> Iterator[str]:
    yield snapshot.models[-1]
    yield f"kernel: {snapshot.kernel_in_words}"
    yield (
        f"a document of {read} tokens, read once for both; {ours.quantized} of them are compressed"
    )
    yield ""
    yield f"question:     {QUESTION}"
    yield from texts(exact, ours)
    yield ""
    ratio = f"  uncompressed / compressed = {token / code:.2f}"
    row = ("one more token, bytes", f"{token:,.0f}", f"{code:,.0f}", ratio)
    yield from table(exact, ours, "question", "answer", row)
    yield ""
    yield (
        "the first and the newest tokens stay in full precision, so that the longer a text, the "
        "more is saved"
    )

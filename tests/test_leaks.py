"""Memory after many requests of different lengths is what it was after the first ones."""

import collections
import functools
import gc
import random

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache

import mlx_turboquant_plugin

ROUND, STORED = 10, 4
LONGEST = 500
# Of keys and values in fp32: 32 tokens of two layers of two heads.
BLOCK = 32 * 2 * 2 * 2 * 32 * 4


class Server:
    """What mlx_lm.server does with requests: batches, and a store of the newest prompt caches."""

    def __init__(self, model):
        self.draw = random.Random(0)
        self.text = self.draw.choices(range(1, tiny_models.COMMON["vocab_size"]), k=2 * LONGEST)
        self.store = LRUPromptCache(STORED)
        self.generator = BatchGenerator(
            model, prefill_batch_size=4, completion_batch_size=8, prefill_step_size=256
        )

    def serve(self, prompts):
        known, rest, caches = [], [], []
        for prompt in prompts:
            cache, left = self.store.fetch_nearest_cache("model", prompt)
            caches.append(cache)
            rest.append(left)
            known.append(prompt[: len(prompt) - len(left)])
        lengths = [self.draw.randint(1, 12) for _ in prompts]
        self.generator.insert(rest, lengths, caches=caches, all_tokens=known)
        while responses := self.generator.next_generated():
            for response in responses:
                if response.finish_reason is not None:
                    self.store.insert_cache("model", response.all_tokens, response.prompt_cache)

    def round(self):
        """Ten requests of different lengths, some of which go on where others began."""
        prompts = []
        for number in range(ROUND):
            start = self.draw.choice([0, self.draw.randint(1, LONGEST)])
            # One more token makes each a prompt that is not stored as it is.
            prompts.append(self.text[start : start + self.draw.randint(1, LONGEST)] + [number])
        self.serve(prompts)

    def settle(self):
        """One request, after which masks and plans are those of it; nothing is stored then."""
        self.store.trim_to(n_sequences=0)
        self.serve([self.text[:400]])
        self.store.trim_to(n_sequences=0)
        # Some hold a limited number of things, of the batches before.
        for cached in caches():
            if cached.cache_info().maxsize is not None:
                cached.cache_clear()
        gc.collect()


def caches():
    """What functions of the plugin keep of their results."""
    return [
        x
        for x in gc.get_objects()
        if isinstance(x, functools._lru_cache_wrapper)
        and x.__module__.startswith("mlx_turboquant_plugin")
    ]


def held():
    """Active memory in bytes, the number of each kind of object, and of what is never forgotten."""
    kinds = collections.Counter(type(x).__name__ for x in gc.get_objects())
    infos = {x.__name__: x.cache_info() for x in caches()}
    endless = {name: info.currsize for name, info in infos.items() if info.maxsize is None}
    return mx.get_active_memory(), kinds, endless


def check(name, rounds):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.enable()
    server = Server(model)
    server.round()
    assert len(server.store) == STORED
    server.settle()
    memory, kinds, endless = held()
    for _ in range(rounds - 1):
        server.round()
    server.settle()
    now, kinds_now, endless_now = held()
    assert abs(now - memory) <= BLOCK
    assert endless_now == endless
    for kind in kinds | kinds_now:
        if kind.endswith(("KVCache", "View", "Tokens", "Rows")):
            assert kinds_now[kind] == kinds[kind], kind
    # What tests before have left may still be moving.
    more = kinds_now - kinds
    assert more.total() < 100, more.most_common(5)


KINDS = pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])


@KINDS
def test_40_requests_leave_what_10_leave(name):
    check(name, 4)


@pytest.mark.slow
@KINDS
def test_300_requests_leave_what_10_leave(name):
    check(name, 30)

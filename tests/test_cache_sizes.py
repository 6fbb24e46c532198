"""What caches of every kind of mlx-lm's take is known before they hold a token."""

import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import tiny_models
from mlx_lm.models.cache import ConcatenateKVCache, QuantizedKVCache, make_prompt_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache.parts import parts_of
from mlx_turboquant_plugin.cache.sizes import MeasuredSize, Row
from mlx_turboquant_plugin.integration.sizes import Sizes
from mlx_turboquant_plugin.serving.sizes import Footprint

# Prompts in chunks, and steps: over a window's end, a step of allocation, a group that is pooled.
PASSES = [300, 129, *[1] * 4, 78, 1, 1, 300, 1]
CHUNK = max(PASSES)
OTHERS = {"concatenated": ConcatenateKVCache, "quantized": QuantizedKVCache}
# Each model, and the kinds of its caches.
MODELS = {
    "gemma3_text": {"KVCache", "RotatingKVCache"},
    "llama4": {"KVCache", "ChunkedKVCache"},
    "falcon_h1": {"KVCache", "ArraysCache"},
    "longcat_flash_ngram": {"KVCache", "ArraysCache"},
    "mamba": {"ArraysCache"},
    "deepseek_v41": {"LayerCache"},
    "concatenated": {"ConcatenateKVCache"},
    "quantized": {"QuantizedKVCache"},
}


class Feeding:
    """A model that gives a cache keys and values; no model of mlx-lm's makes such a one."""

    def __init__(self, kind):
        self.make_cache = lambda: [kind()]

    def __call__(self, tokens, cache):
        cache[0].update_and_fetch(*2 * [mx.ones((1, 2, tokens.shape[1], 64))])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_caches_never_take_more_than_was_said(name, compressed):
    if compressed:
        mlx_turboquant_plugin.enable()
    model = Feeding(OTHERS[name]) if name in OTHERS else tiny_models.build(name)
    caches = make_prompt_cache(model)
    footprint, length = Footprint([model], CHUNK), 0
    for count in PASSES:
        model(mx.zeros((1, count), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])
        length += count
        assert sum(cache.nbytes for cache in caches) <= footprint.row(Row(1, length))
    if not compressed:
        assert {type(one).__name__ for one in parts_of(caches)} == MODELS[name]


def test_all_kinds_are_here():
    kinds = set()
    for path in Path(mlx_lm.__file__).parent.glob("models/*.py"):
        kinds |= set(re.findall(r"^class (\w+Cache)\b", path.read_text("utf-8"), re.M))
    assert len(kinds) > 5
    # Lists of others, what they are made of, batches, what isn't of a sequence.
    others = {"CacheList", "_BaseCache", "BatchKVCache", "BatchRotatingKVCache", "LRUPromptCache"}
    assert kinds - others <= set().union(*MODELS.values())


def test_growth_is_seen_far_away():
    model = tiny_models.build("deepseek_v41")
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 4096), mx.int32), cache=caches)
    true = sum(cache.nbytes for cache in caches)
    empty = make_prompt_cache(model)
    sizes = Sizes(model, empty)
    # The groups were empty there.
    assert true <= sizes.at(empty, 4096) < 1.25 * true
    # A latent and an index key of each group, in fp32: of 4 and of 128 tokens.
    far = 10**6
    token = (sizes.at(empty, 2 * far) - sizes.at(empty, far)) / far
    assert token == pytest.approx((64 + 64) * 4 / 4 + (64 + 64) * 4 / 128, rel=1e-3)


@pytest.mark.parametrize(
    "nbytes",
    [
        lambda count: 5000,
        lambda count: 7 * count,
        lambda count: 7 * count + 900 * min(count, 1500),
        lambda count: 900 * min(count, 48),
        # A group of 64 that waits for more.
        lambda count: 40 * (count // 64) + 80 * (count % 64),
    ],
)
def test_between_points(nbytes):
    lengths = [1, *(2**power - 1 for power in range(9, 14))]
    size = MeasuredSize(tuple((count, nbytes(count)) for count in lengths))
    for count in [*range(1, 2000), 5000, 8191, 8192, 10**5, 10**6]:
        most = size.most(Row(1, count), 512)
        assert nbytes(count) <= most <= nbytes(count) + size.points[1][1] + 900 * 750
    assert size.at(8191) == nbytes(8191)

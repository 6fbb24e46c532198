"""A pass that ends in the middle: the cache goes on right, or is refused. Never a wrong answer."""

import copy
import pickle
from contextlib import contextmanager
from operator import attrgetter

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_models
from filled_caches import apart, random
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm_cache

import mlx_turboquant_plugin

LENGTH = 130


# Where Ctrl-C comes: the layer, its part, and whether that has done its work.
PLACES = [
    (0, "self_attn", False),
    (0, "self_attn.o_proj", False),
    (0, "self_attn", True),
    (1, "mlp", False),
    (-1, "self_attn.o_proj", False),
    (-1, "mlp", True),
]


@contextmanager
def interrupted(model, layer, part, after):
    """Ctrl-C comes there."""
    target = attrgetter(part)(model.layers[layer])
    kind = type(target)
    original = vars(kind)["__call__"]

    def call(self, *args, **kwargs):
        if self is not target:
            return original.__get__(self, kind)(*args, **kwargs)
        if after:
            original.__get__(self, kind)(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "__call__", call)
        yield


@pytest.fixture
def model():
    """A model and the tokens of a text."""
    model, tokenizer = tiny.load("tiny-qwen2")
    mlx_turboquant_plugin.enable(window=32, kernel="eager")
    return model, tiny.text_tokens(tokenizer, 300)


def made(model, rows=1):
    caches = mlx_lm_cache.make_prompt_cache(model)
    return caches if rows == 1 else [cache.merge([cache] * rows) for cache in caches]


def sizes(caches):
    return [cache.size() for cache in caches]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("count", [1, 16, 40])
@pytest.mark.parametrize("layer, part, after", PLACES)
def test_a_cache_is_refused_until_it_is_trimmed(model, layer, part, after, count, rows):
    model, tokens = model
    tokens = mx.array([tokens] * rows)
    mlx_turboquant_plugin.disable()
    # Forty tokens are too many to forget them without trace.
    mlx_turboquant_plugin.enable(
        window=32, kernel="eager", bypass="identity" if count > 16 else None
    )
    caches = made(model, rows)
    tiny.logits(model, tokens[:, :LENGTH], caches)
    new = tokens[:, LENGTH : LENGTH + count]
    expected, _ = tiny.logits(model, new, copy.deepcopy(caches), chunk=count)
    with interrupted(model, layer, part, after):
        model(new, cache=caches)
    held = sizes(caches)
    assert set(held) <= {LENGTH, LENGTH + count}
    if len(set(held)) > 1:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"interrupted: trim each to {LENGTH}"):
                model(new, cache=caches)
        assert sizes(caches) == held
    for cache in caches:
        cache.trim(cache.size() - LENGTH)
    again, _ = tiny.logits(model, new, caches, chunk=count)
    np.testing.assert_allclose(again, expected, atol=1e-3)


def test_parts_of_a_model_refuse_too(model):
    """Programs that want hidden states call them by themselves."""
    model, tokens = model
    tokens, caches = mx.array([tokens]), made(model)
    model.model(tokens[:, :LENGTH], cache=caches)
    with interrupted(model, 1, "mlp", False):
        model.model(tokens[:, LENGTH : LENGTH + 5], cache=caches)
    with pytest.raises(RuntimeError, match=f"interrupted: trim each to {LENGTH}"):
        model.model(tokens[:, LENGTH : LENGTH + 5], cache=caches)


def generated(model, prompt, caches, count=6):
    """(tokens, logprobs) of ``count`` steps."""
    steps = generate_step(
        mx.array(prompt), model, max_tokens=count, prompt_cache=caches, prefill_step_size=50
    )
    return [(int(token), np.array(logprobs)) for token, logprobs in steps]


@pytest.mark.parametrize("passes", [0, 1, 3, 6], ids=["chunk", "later chunk", "first step", "step"])
@pytest.mark.parametrize("layer, part, after", PLACES[1:4])
def test_generate_step(passes, layer, part, after, model, monkeypatch):
    """Whoever hands the same cache in again gets what it holds continued, or an error."""
    model, tokens = model
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(window=32, kernel="eager", bypass="identity")
    prompt, caches = tokens[:LENGTH], made(model)
    call, calls = type(model).__call__, []

    def counted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) <= passes:
            return call(self, *args, **kwargs)
        with interrupted(model, layer, part, after):
            call(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model), "__call__", counted)
        generated(model, prompt, caches)
    if len(set(sizes(caches))) > 1:
        with pytest.raises(RuntimeError, match="interrupted: trim each"):
            generated(model, [1, 2, 3], caches)
        least = min(sizes(caches))
        for cache in caches:
            cache.trim(cache.size() - least)
    [held] = set(sizes(caches))
    expected = generated(model, prompt, made(model), 12)
    sequence = prompt + [token for token, _ in expected]
    rest = sequence[held : max(LENGTH, held + 1)]
    again = generated(model, rest, caches)
    for (_, logprobs), (_, others) in zip(again, expected[held + len(rest) - LENGTH :]):
        np.testing.assert_allclose(logprobs, others, atol=1e-3)


@pytest.mark.parametrize("layer, part, after", PLACES[1:4])
def test_a_batch_generator(layer, part, after, model):
    model, tokens = model
    generator = BatchGenerator(model, max_tokens=8, prefill_step_size=50)
    generator.insert([tokens[:LENGTH], tokens[:40]])
    while not generator._generation_batch.uids:
        generator.next()
    with interrupted(model, layer, part, after):
        generator.next()
    if after or layer:
        with pytest.raises(RuntimeError, match="interrupted: trim each"):
            generator.next()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_recurrent_state_can_not_go_back(rows, tmp_path):
    model = tiny_models.build("falcon_h1")
    mlx_turboquant_plugin.enable()
    caches, tokens = made(model, rows), mx.stack([mx.arange(20)] * rows)
    model(tokens, cache=caches)
    copies = copy.deepcopy(caches)
    with interrupted(model, -1, "feed_forward", True):
        model(tokens[:, :1], cache=caches)
    file = str(tmp_path / "cache.safetensors")
    ways = [
        lambda caches: model(tokens[:, :1], cache=caches),
        lambda caches: model(tokens[:, :1], cache=copy.deepcopy(caches)),
        # None of these may make a cache of it that nobody refuses.
        pickle.dumps,
        lambda caches: mlx_lm_cache.save_prompt_cache(file, caches),
        lambda caches: [cache.merge([cache]) for cache in caches],
        lambda caches: [cache.extract(0) for cache in caches],
        lambda caches: [cache.extend(other) for cache, other in zip(copy.deepcopy(copies), caches)],
    ]
    for way in (*ways[:4], *(ways[4:5] if rows == 1 else ways[5:])):
        with pytest.raises(RuntimeError, match=r"interrupted.*make the prompt cache again"):
            way(caches)
    model(tokens[:, :1], cache=copies)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["falcon_h1", "jamba"])
def test_what_fails_before_anything_changes_is_forgiven(name, rows):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.enable(kernel="eager")
    caches, tokens = made(model, rows), mx.stack([mx.arange(20)] * rows)
    model(tokens, cache=caches)
    expected = model(tokens, cache=copy.deepcopy(caches))
    with pytest.raises(ValueError, match="integral"):
        model(tokens.astype(mx.float32), cache=caches)
    np.testing.assert_array_equal(model(tokens, cache=caches), expected)


def test_a_padded_prompt_that_ended_early():
    batch = apart()
    batch.prepare(lengths=[30, 3], right_padding=[0, 27])
    batch.update_and_fetch(*random(10, 2, seed=3))
    batch.finalize()
    assert batch.offset.tolist() == [row.offset for row in batch.rows] == [310, 203]
    assert batch.trim(5) == 5 and batch.offset.tolist() == [305, 198]


def test_a_batch_that_expects_padding_is_not_trimmed():
    batch = apart()
    batch.prepare(lengths=[30, 10], right_padding=[0, 20])
    batch.update_and_fetch(*random(30, 2, seed=3))
    with pytest.raises(ValueError, match="finalize"):
        batch.trim(5)
    batch.finalize()
    assert batch.trim(5) == 5 and batch.offset.tolist() == [325, 205]

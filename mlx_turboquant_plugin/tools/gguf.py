"""A Llama model in a GGUF file, made into a folder that mlx-lm loads."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3


def convert(source: Path, folder: Path) -> None:
    """Write config.json, the weights in bfloat16 and the tokenizer into an existing ``folder``.

    Quantized weights are dequantized: on a CPU MLX multiplies prompts by them at half the speed.

    Raises:
        RuntimeError: ``source`` is no GGUF file, or is cut short.
        KeyError: it holds another kind of model.
        OSError: ``folder`` can't be written.
    """
    loaded: Any = mx.load(str(source), return_metadata=True)
    arrays, metadata = loaded
    config = _config(metadata, "output.weight" not in arrays)
    weights = dense(arrays, config["num_attention_heads"], config["num_key_value_heads"])
    try:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    except RuntimeError as error:  # MLX's own for a full disk, too.
        raise OSError(str(error)) from error
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    _tokenizer(metadata).save_pretrained(folder)


def dense(arrays: dict[str, mx.array], heads: int, kv_heads: int) -> dict[str, mx.array]:
    """mlx-lm's weights, bfloat16, from the arrays of ``mx.load``: a GGUF's, quantized or not.

    GGUF has the pairs of channels that RoPE turns side by side, mlx-lm in two halves of a head.
    """
    weights = {}
    for key, x in arrays.items():
        base, kind = key.rsplit(".", 1)
        if kind != "weight":
            continue
        scales = arrays.get(f"{base}.scales")
        if scales is not None:
            # 32 weights share a scale, and 32 bits hold a column of packed ones.
            bits = x.shape[-1] // scales.shape[-1]
            x = mx.dequantize(x, scales, arrays[f"{base}.biases"], group_size=32, bits=bits)
        *block, part = base.split(".")
        count = {"attn_q": heads, "attn_k": kv_heads}.get(part)
        if count:
            x = x.reshape(count, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        name = NAMES[part]
        if block:
            name = f"model.layers.{block[1]}.{name}"
        weights[f"{name}.weight"] = x.astype(mx.bfloat16)
    return weights


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    def number(key):
        return metadata[f"llama.{key}"].item()

    return {
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        "intermediate_size": number("feed_forward_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
    }


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """SmolLM's: bytes in pairs, digits one by one."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    pairs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pairs])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    end = tokens[metadata["tokenizer.ggml.eos_token_id"].item()]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, clean_up_tokenization_spaces=False
    )
    fast.chat_template = metadata["tokenizer.chat_template"]
    return fast

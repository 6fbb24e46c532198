"""The architectures of mlx-lm: those that can be compressed, and why the others can't.

Every module of ``mlx_lm.models`` is in one of the three tables; docs/models.md is made
of them and of what becomes of a tiny model of each.
"""

from dataclasses import replace
from typing import Any

from .family import Family


def why_not(module: str) -> str | None:
    """Why the models of a module of mlx-lm can't be compressed, or None."""
    package, _, name = module.rpartition(".")
    return UNSUPPORTED.get(name) if package == "mlx_lm.models" else None


def _compressed_unless_softcapped(attention: Any) -> str | None:
    return "a cap on scores is not supported" if attention.attn_logit_softcapping else None


def _read_by_later_layers(attention: Any) -> bool:
    config, kind = attention.config, attention.layer_type
    own = config.num_hidden_layers - config.num_kv_shared_layers
    # Each reads the keys of the last layer of its kind that has any.
    return (
        kind in config.layer_types[own:]
        and kind not in config.layer_types[attention.layer_idx + 1 : own]
    )


def _compressed_if_dense(attention: Any) -> str | None:
    return "block-sparse attention is not supported" if attention.block_sparse else None


def _compressed_if_global(attention: Any) -> str | None:
    if attention.full_attn:
        return None
    return "queries of sliding layers see one token more than their cache keeps"


def _with_blocks(*kinds: str):
    return lambda model: [layer for layer in model.layers if layer.block_type in kinds]


def _layers_of_every_loop(model: Any) -> list[Any]:
    return model.layers * model.model.num_loops


def _layers_and_ngrams(model: Any) -> list[Any]:
    ngrams = getattr(model.model, "ngram_embeddings", None)
    return model.layers if ngrams is None else [ngrams, *model.layers]


def _layers_with_keys(model: Any) -> list[Any]:
    return [layer for layer in model.layers if layer.self_attn.has_kv]


def _layers_that_follow_none(model: Any) -> list[Any]:
    return [layer for layer in model.layers if not layer.self_attn.is_kv_shared_layer]


def _layers_with_attention(model: Any) -> list[Any]:
    return [layer for layer in model.layers if layer.self_attn is not None]


# The names of mlx-lm's oldest modules, and those of Hugging Face's configurations.
OWN = Family()
HF = Family(heads="num_attention_heads", kv_heads="num_key_value_heads")
MIXED = Family(heads="num_heads", kv_heads="num_key_value_heads")
SHORT = Family(heads="num_heads", kv_heads="num_kv_heads")
FUSED = ("qkv_proj",)
# Multi-head latent attention.
MLA = Family(
    layer_norm=None,
    heads="num_heads",
    kv_heads=1,
    projections=("kv_a_proj_with_mqa",),
    dims=("kv_lora_rank", "qk_rope_head_dim"),
    rope="",
    reads_arrays=True,
    latent=True,
)
# The same, but what is cached are whole keys, made of a latent and of a part with rotary positions.
WHOLE_KEYS = Family(
    heads="num_heads",
    kv_heads="num_heads",
    projections=("kv_b_proj",),
    dims=("q_head_dim", "v_head_dim"),
)
LATE_NORMS = ("query_layernorm", "key_layernorm")
SHORT_NORMS = ("q_layernorm", "k_layernorm")

FAMILIES: dict[str, Family] = {
    "Klear": replace(HF, attention="KlearAttention"),
    # All layers that have no keys read those of one, which knows as little of it as the others.
    "afm7": replace(
        OWN,
        projections=FUSED,
        shared=lambda attention: True,
        cached_layers=lambda model: model.model.layers,
    ),
    "afmoe": OWN,
    "apertus": replace(HF, attention="ApertusAttention", layer_norm="attention_layernorm"),
    "baichuan_m1": replace(SHORT, projections=("W_pack",)),
    "bailing_hybrid": replace(MLA, attention="MultiLatentAttention", layer_attention="attention"),
    "bailing_moe": replace(
        HF,
        attention="BailingMoeAttention",
        layer_attention="attention",
        projections=("query_key_value",),
        head_norms=LATE_NORMS,
    ),
    "bailing_moe_linear": replace(
        HF,
        layer_attention="attention",
        projections=("query_key_value",),
        head_norms=LATE_NORMS,
    ),
    "bailing_moe_v3": replace(MLA, attention="BailingMLA", layer_attention="attention"),
    "cohere": OWN,
    "cohere2": OWN,
    "dbrx": replace(
        MIXED,
        layer_attention="norm_attn_norm.attn",
        layer_norm="norm_attn_norm.norm_1",
        projections=("Wqkv",),
    ),
    "deepseek": replace(HF, attention="DeepseekAttention", kv_heads="num_kv_heads"),
    "deepseek_v2": replace(WHOLE_KEYS, attention="DeepseekV2Attention"),
    "deepseek_v3": replace(MLA, attention="DeepseekV3Attention"),
    # Its indexer's cache, the second of a layer, stays as it is.
    "deepseek_v32": replace(MLA, attention="DeepseekV32Attention"),
    "dots1": replace(OWN, attention="Dots1Attention"),
    "ernie4_5": OWN,
    "ernie4_5_moe": OWN,
    "exaone": replace(
        OWN, attention="AttentionModule", layer_attention="attn.attention", layer_norm="ln_1"
    ),
    "exaone4": replace(OWN, layer_norm=None),
    "exaone_moe": OWN,
    "falcon_h1": replace(SHORT, attention="FalconH1Attention"),
    "gear": replace(OWN, obstacle=_compressed_unless_softcapped),
    "gemma": OWN,
    # It caps its scores, which mlx-lm's fused attention can't.
    "gemma2": replace(OWN, reads_arrays=True),
    "gemma3_text": OWN,
    "gemma3n": replace(
        OWN,
        attention="Gemma3nAttention",
        follows=lambda attention: attention.is_kv_shared_layer,
        cached_layers=_layers_that_follow_none,
    ),
    "gemma4_text": replace(OWN, shared=_read_by_later_layers, cached_layers=_layers_with_keys),
    "glm": replace(HF, attention="GLMAttention"),
    "glm4": replace(OWN, attention="Glm4Attention"),
    "glm4_moe": OWN,
    "glm4_moe_lite": replace(MLA, attention="Glm4MoeLiteAttention"),
    "gpt2": Family(
        layer_attention="attn",
        layer_norm="ln_1",
        heads="n_head",
        kv_heads="n_head",
        projections=("c_attn",),
    ),
    "gpt_bigcode": replace(OWN, layer_attention="attn", layer_norm="ln_1", projections=("c_attn",)),
    "gpt_neox": Family(
        layer_attention="attention",
        heads="num_attention_heads",
        kv_heads="num_attention_heads",
        projections=("query_key_value",),
        grouped=True,
    ),
    "gpt_oss": replace(HF, attention="AttentionBlock"),
    "gptj": Family(
        attention="GPTJAttention",
        layer_attention="attn",
        layer_norm="ln_1",
        heads="num_attention_heads",
        kv_heads="num_attention_heads",
    ),
    "granite": OWN,
    "granitemoe": replace(OWN, attention="GraniteMoeAttention"),
    "granitemoehybrid": replace(OWN, attention="GraniteMoeHybridAttention"),
    "helium": replace(OWN, attention="HeliumAttention"),
    "hunyuan": replace(OWN, head_norms=LATE_NORMS),
    "hunyuan_v1_dense": replace(OWN, head_norms=LATE_NORMS),
    "internlm2": replace(
        OWN,
        layer_attention="attention",
        layer_norm="attention_norm",
        projections=("wqkv",),
        grouped=True,
    ),
    "internlm3": OWN,
    "jamba": replace(HF, attention="JambaAttention"),
    "kimi_k3": replace(MLA, attention="KimiK3MLAAttention"),
    "kimi_linear": replace(MLA, attention="KimiMLAAttention"),
    "laguna": OWN,
    "lfm2": replace(OWN, layer_norm="operator_norm", head_norms=SHORT_NORMS),
    "lfm2_moe": replace(OWN, layer_norm="operator_norm", head_norms=SHORT_NORMS),
    "lille-130m": replace(
        OWN,
        attention="Lille130mAttention",
        layer_attention="attention",
        layer_norm="attention.norm",
        heads="n_head",
        projections=FUSED,
    ),
    "llama": OWN,
    # Both may norm their heads without weights.
    "llama4": replace(OWN, layer_norm=None),
    "llama4_text": replace(OWN, layer_norm=None),
    # Two attentions in a layer; a model of n-grams has a cache for these, too, before all others.
    "longcat_flash": replace(
        MLA,
        attention="LongcatFlashMLA",
        heads="num_attention_heads",
        cached_layers=_layers_and_ngrams,
    ),
    "mellum": OWN,
    "mimo": OWN,
    "mimo_v2_flash": OWN,
    "minicpm": MIXED,
    "minicpm3": WHOLE_KEYS,
    "minimax": replace(HF, attention="MiniMaxAttention"),
    "ministral3": OWN,
    "mistral4": replace(MLA, attention="Mistral4Attention"),
    "mixtral": replace(MIXED, attention="MixtralAttention"),
    "muse_glimmer": replace(OWN, layer_norm=None),
    "nanbeige": replace(OWN, cached_layers=_layers_of_every_loop),
    "nanochat": replace(
        SHORT, layer_attention="attn", layer_norm=None, projections=("c_q", "c_k", "c_v")
    ),
    "nemotron": OWN,
    "nemotron-nas": replace(OWN, cached_layers=_layers_with_attention),
    "nemotron_h": replace(
        MIXED,
        attention="NemotronHAttention",
        layer_attention="mixer",
        layer_norm="norm",
        cached_layers=_with_blocks("M", "*"),
    ),
    "olmo2": replace(OWN, layer_norm=None),
    "olmo3": replace(HF, attention="Olmo3Attention", layer_norm=None),
    "olmo_hybrid": replace(HF, layer_norm=None),
    "olmoe": OWN,
    "openelm": replace(OWN, layer_attention="attn", layer_norm="attn_norm", projections=FUSED),
    "phi": replace(MIXED, attention="PhiAttention"),
    "phi3": replace(OWN, projections=FUSED),
    "phi3small": replace(
        OWN, projections=("query_key_value",), grouped=True, obstacle=_compressed_if_dense
    ),
    "phimoe": OWN,
    "phixtral": Family(
        attention="RoPEAttention",
        layer_attention="mixer",
        layer_norm="ln",
        heads="num_heads",
        kv_heads="num_heads",
        projections=("Wqkv",),
    ),
    "plamo3": Family(
        layer_attention="mixer",
        layer_norm="pre_mixer_norm",
        heads="q_num_heads",
        kv_heads="k_num_heads",
        projections=FUSED,
        obstacle=_compressed_if_global,
    ),
    "qwen": Family(
        layer_attention="attn",
        layer_norm="ln_1",
        heads="num_attention_heads",
        kv_heads="num_attention_heads",
        projections=("c_attn",),
        rope="rotary_emb",
    ),
    "qwen2": OWN,
    "qwen2_moe": OWN,
    "qwen3": OWN,
    "qwen3_moe": OWN,
    "qwen3_next": replace(HF, attention="Qwen3NextAttention"),
    "recurrent_gemma": Family(
        attention="LocalAttentionBlock",
        layer_attention="temporal_block",
        layer_norm="temporal_pre_norm",
        heads="num_heads",
        kv_heads=1,
    ),
    "seed_oss": OWN,
    "spark2_5": replace(OWN, projections=("q_k_v_proj",)),
    "stablelm": replace(MIXED, head_norms=SHORT_NORMS, casts_keys=True),
    "starcoder2": OWN,
    "step3p5": replace(SHORT, attention="Step3p5Attention"),
    "talkie": Family(
        layer_attention="attn",
        layer_norm=None,
        kv_heads="n_heads",
        projections=("attn_query", "attn_key", "attn_value"),
    ),
    "telechat3": replace(HF, attention="Telechat3Attention"),
    "youtu_llm": replace(WHOLE_KEYS, attention="YoutuLLMAttention"),
}

# Models that attend through the modules of others.
THROUGH: dict[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "glm_moe_dsa": "deepseek_v32",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "longcat_flash_ngram": "longcat_flash",
    "mistral3": "llama, ministral3",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_next",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_next",
    "qwen3_5_moe": "qwen3_next",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "smollm3": "llama",
    "solar_open": "glm4_moe",
}

_RECURRENT = "it has no keys and values, only a state of fixed size"

UNSUPPORTED: dict[str, str] = {
    "bitnet": "its linear layers need Metal, and nobody has tested it",
    "deepseek_v41": "its caches are of its own kinds: latents, pooled keys and a window",
    "iquestloopcoder": "its model, not its attention, updates the caches and reads their arrays",
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minimax_m3_vl": "an indexer picks blocks of keys for every query (sparse attention)",
    "muse_spark": "its rotary positions need Metal, and nobody has tested it",
    "olmo": "it attends in code of the package ai2-olmo",
    "plamo": "its query heads h, h + n, ... share KV head h, not neighbouring ones",
    "plamo2": "it calls MLX's attention directly, without its cache",
    "rwkv7": _RECURRENT,
}

# Modules of mlx_lm.models that are no models.
PARTS = (
    "activations base bitlinear_layers cache gated_delta mla pipeline rope_utils ssm switch_layers"
).split()

"""A tiny model with random weights of almost every architecture of mlx-lm."""

import importlib
import zlib

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_turboquant_plugin.integration import table
from mlx_turboquant_plugin.integration.family import attention_of, register

# More than settings for tests keep in full precision, so that sliding layers have codes.
WINDOW = 72

# What most configurations have; each model takes what it knows.
COMMON = dict(
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=64,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    layer_norm_eps=1e-5,
    layer_norm_epsilon=1e-5,
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    partial_rotary_factor=0.5,
    tie_word_embeddings=False,
    attention_bias=True,
    attention_out_bias=False,
    mlp_bias=False,
    use_bias=True,
    qkv_bias=True,
    use_qkv_bias=True,
    use_qk_norm=True,
    sliding_window=WINDOW,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_shared_experts=1,
    num_shared_experts=1,
    shared_expert_intermediate_size=32,
    first_k_dense_replace=0,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    scoring_func="sigmoid",
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    conv_L_cache=3,
)
SLIDING = ["sliding_attention", "full_attention"]
CONV = ["conv", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
MULTIPLIERS = dict(
    logits_scaling=1.0, attention_multiplier=0.2, embedding_multiplier=1.0, residual_multiplier=1.0
)
MAMBA = dict(
    mamba_n_heads=2,
    mamba_d_head=32,
    mamba_proj_bias=False,
    mamba_d_state=16,
    mamba_d_conv=4,
    mamba_n_groups=1,
    mamba_conv_bias=True,
)
GPT = dict(n_ctx=4096, n_positions=4096, n_embd=128, n_head=4, n_layer=2, n_inner=64)
ROPE = dict(rope_type="default", type="default", rope_theta=1e4, partial_rotary_factor=0.5)
LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
QWEN3_5 = dict(full_attention_interval=2, rope_parameters=ROPE)
MINISTRAL = dict(
    layer_types=SLIDING,
    rope_parameters=dict(
        rope_type="default",
        rope_theta=1e4,
        llama_4_scaling_beta=0.1,
        original_max_position_embeddings=64,
    ),
)
LFM2 = dict(
    norm_eps=1e-5,
    conv_bias=False,
    block_dim=128,
    block_multiple_of=32,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False,
    layer_types=CONV,
)


def text(model_type, **special):
    """The configuration of a model of text and images."""
    return dict(text_config={**COMMON, **special, "model_type": model_type})


# What a model needs besides, or instead.
SPECIAL = {
    "afmoe": dict(layer_types=SLIDING, num_dense_layers=1),
    "apertus": dict(post_norm=False, qk_norm=True),
    "baichuan_m1": dict(sliding_window_layers=[0], conv_window=2),
    "bailing_moe_linear": dict(layer_group_size=2, group_norm_size=1, num_key_value_heads=4),
    "cohere2": dict(sliding_window_pattern=2),
    "dbrx": dict(
        d_model=128,
        n_layers=2,
        n_heads=4,
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
    ),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2),
    "exaone": dict(num_layers=2),
    "exaone4": dict(rope_scaling=None, sliding_window_pattern="LG"),
    "exaone_moe": dict(layer_types=SLIDING, is_moe_layer=[False, True]),
    "falcon_h1": dict(
        mamba_d_ssm=64, mamba_d_head=32, mamba_n_heads=2, mamba_d_state=16, mamba_chunk_size=32
    ),
    "gear": dict(layer_types=SLIDING, query_pre_attn_scalar=32),
    "gemma3": text("gemma3_text", sliding_window_pattern=2, query_pre_attn_scalar=32),
    "gemma3_text": dict(sliding_window_pattern=2, query_pre_attn_scalar=32),
    "gemma4": text(
        "gemma4_text",
        layer_types=SLIDING,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        global_head_dim=64,
        vocab_size_per_layer_input=64,
    ),
    "gemma4_text": dict(
        layer_types=SLIDING,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        global_head_dim=64,
        vocab_size_per_layer_input=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
    ),
    "glm4_moe": dict(rope_scaling=None, topk_method="noaux_tc"),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "gpt_oss": dict(layer_types=SLIDING),
    "gptj": dict(GPT, rotary_dim=16),
    "granite": MULTIPLIERS,
    "granitemoe": MULTIPLIERS,
    "granitemoehybrid": dict(
        MULTIPLIERS, **MAMBA, layer_types=["mamba", "attention"], shared_intermediate_size=64
    ),
    "hunyuan": dict(
        moe_topk=2,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling=dict(type="dynamic", factor=1.0, alpha=10.0),
    ),
    "internlm2": dict(bias=True),
    "jamba": dict(
        MAMBA,
        mamba_expand=2,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
    ),
    "laguna": dict(
        layer_types=SLIDING,
        num_attention_heads_per_layer=[4, 4],
        mlp_layer_types=["dense", "sparse"],
        rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE),
    ),
    "lfm2": LFM2,
    "lfm2-vl": text("lfm2", **LFM2),
    "lfm2_moe": dict(
        norm_eps=1e-5, conv_bias=False, use_expert_bias=True, num_dense_layers=1, layer_types=CONV
    ),
    "lille-130m": dict(GPT, block_size=4096, n_kv_heads=2),
    "llama": dict(layer_types=SLIDING),
    "llama4": text(
        "llama4_text",
        num_hidden_layers=4,
        attention_chunk_size=64,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=64,
        rope_scaling=None,
        num_experts_per_tok=1,
    ),
    "llama4_text": dict(intermediate_size_mlp=64, no_rope_layers=[1, 0]),
    "mellum": dict(
        layer_types=SLIDING,
        rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE),
    ),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[1, 0],
        moe_layer_freq=[0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=WINDOW,
        n_shared_experts=None,
        topk_method="noaux_tc",
        layernorm_epsilon=1e-5,
        swa_rope_theta=1e4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=1,
        v_head_dim=64,
        swa_head_dim=64,
        swa_v_head_dim=32,
        attention_value_scale=0.7,
    ),
    "minicpm": dict(dim_model_base=128, scale_depth=1.4, scale_emb=1.0),
    "minicpm3": dict(
        LATENT,
        dim_model_base=128,
        scale_depth=1.4,
        scale_emb=1.0,
        rope_scaling=dict(
            type="longrope",
            original_max_position_embeddings=4096,
            short_factor=[1.0] * 8,
            long_factor=[1.0] * 8,
        ),
    ),
    "minimax": dict(shared_intermediate_size=64, rotary_dim=16),
    "ministral3": MINISTRAL,
    "mistral3": text("ministral3", **MINISTRAL),
    "muse_glimmer": dict(layer_types=SLIDING, layer_rope_theta=[1e4, 0]),
    "nanbeige": dict(num_loops=2),
    "nemotron": dict(hidden_act="relu2", norm_eps=1e-5),
    "nemotron-nas": dict(
        num_hidden_layers=3,
        block_configs=[
            dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=1.0)),
            dict(attention=dict(no_op=True), ffn=dict(ffn_mult=1.0)),
            dict(attention=dict(n_heads_in_group=4), ffn=dict(ffn_mult=1.0)),
        ],
    ),
    "nemotron_h": dict(
        hybrid_override_pattern="M-*-",
        num_hidden_layers=4,
        mamba_num_heads=2,
        mamba_head_dim=32,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=1,
        use_conv_bias=True,
    ),
    "olmo3": dict(layer_types=SLIDING),
    "olmo_hybrid": dict(layer_types=LINEAR, linear_allow_neg_eigval=True),
    "openelm": dict(
        num_transformer_layers=2,
        model_dim=128,
        ffn_dim_divisor=32,
        num_query_heads=[4, 4],
        num_kv_heads=[2, 1],
        ffn_multipliers=[1.0, 1.0],
    ),
    "phi3small": dict(
        vocab_size=100352,  # It sets the logits of tokens by number.
        dense_attention_every_n_layers=2,
        ff_intermediate_size=64,
        gegelu_limit=20.0,
        mup_attn_multiplier=1.0,
        blocksparse_num_local_blocks=2,
    ),
    "phixtral": dict(num_vocab=64, model_dim=128, num_heads=4, num_layers=2, rotary_dim=16),
    "pixtral": text("llama"),
    "plamo3": dict(window_size=WINDOW, sliding_window_pattern=2),
    "prism_hadamard_qwen35": dict(
        text("qwen3_5_text", **QWEN3_5, num_experts=0),
        schema_version=1,
        tensor_namespace="mlx-lm-text",
        quantization=dict(bits=2, group_size=128, mode="affine"),
        modules=[
            dict(path="model.layers.1.mlp.up_proj", embedding=False, dtype="float16", block=0)
        ],
    ),
    "qwen": dict(kv_channels=32),
    "qwen2_vl": text("qwen2"),
    "qwen3_5": text("qwen3_5_text", **QWEN3_5),
    "qwen3_5_moe": text("qwen3_5_moe_text", **QWEN3_5),
    "qwen3_next": dict(full_attention_interval=2),
    "qwen3_vl": text("qwen3"),
    "qwen3_vl_moe": text("qwen3_moe"),
    "recurrent_gemma": dict(
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=WINDOW,
        block_types=["recurrent", "attention"],
    ),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "solar_open": dict(topk_method="noaux_tc"),
    "spark2_5": dict(
        layer_types=SLIDING,
        rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE),
    ),
    "stablelm": dict(qk_layernorm=True),
    "step3p5": dict(
        num_attention_groups=2,
        layer_types=SLIDING,
        moe_num_experts=4,
        moe_top_k=2,
        share_expert_dim=32,
        moe_layers_enum="1",
    ),
    "youtu_llm": LATENT,
}

MLA = dict(LATENT, qk_rope_head_dim=32, rope_scaling=None, topk_method="noaux_tc")
INDEXER = dict(index_head_dim=32, index_n_heads=2, index_topk=32)
KDA = dict(
    kda_layers=[1],
    full_attn_layers=[2],
    num_heads=2,
    head_dim=32,
    short_conv_kernel_size=4,
    gate_lower_bound=-5.0,
)
LONGCAT = dict(
    MLA,
    attention_method="MLA",
    zero_expert_type="identity",
    ffn_hidden_size=64,
    moe_topk=2,
    expert_ffn_hidden_size=32,
    zero_expert_num=1,
    num_layers=2,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    attention_bias=False,
)

# The same of those that compute with keys as arrays, share them or are not supported.
SPECIAL |= {
    "afm7": dict(hidden_dim=128, num_layers=4, num_kv_reuse_layers=2, num_heads=4, num_kv_heads=2),
    "bailing_hybrid": dict(MLA, layer_group_size=2, group_norm_size=1),
    "bailing_moe_v3": dict(MLA, layer_group_size=2, moe_shared_expert_intermediate_size=32),
    "deepseek_v2": dict(
        MLA,
        topk_method="greedy",
        rope_scaling=dict(type="yarn", factor=1.0, original_max_position_embeddings=4096),
    ),
    "deepseek_v3": MLA,
    "deepseek_v32": dict(MLA, **INDEXER),
    "deepseek_v41": dict(
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        compress_ratios=[4, 128],
        kv_source_layer_ids=[0, 1],
        index_source_layer_ids=[0, 1],
        index_n_heads=2,
        index_head_dim=64,
        index_topk=16,
        hc_mult=2,
    ),
    "gemma3n": text(
        "gemma3n",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=64,
        rope_local_base_freq=1e4,
        final_logit_softcapping=30.0,
        layer_types=SLIDING * 2,
        activation_sparsity_pattern=[0.0] * 4,
        hidden_size_per_layer_input=16,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=16,
    ),
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": dict(MLA, **INDEXER, rope_parameters=ROPE, moe_layer_freq=1),
    "kimi_k25": text("deepseek_v3", **MLA),
    "kimi_k3": text("kimi_linear", **MLA, linear_attn_config=KDA, num_experts_per_token=2),
    "kimi_linear": dict(
        MLA, linear_attn_config=KDA, num_experts_per_token=2, model_max_length=4096
    ),
    "kimi_vl": text("deepseek_v3", **MLA),
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mamba": dict(state_size=16, conv_kernel=4, use_conv_bias=True, time_step_rank=8),
    "mamba2": dict(
        num_heads=4,
        state_size=16,
        conv_kernel=4,
        n_groups=1,
        use_conv_bias=True,
        time_step_limit=(0.0, 100.0),
        time_step_rank=8,
        intermediate_size=128,
    ),
    "minimax_m3_vl": text(
        "minimax_m3",
        dense_intermediate_size=64,
        shared_intermediate_size=64,
        layer_types=["full_attention", "sparse"],
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=16,
        index_topk_blocks=4,
    ),
    "mistral4": dict(MLA, rope_parameters=MINISTRAL["rope_parameters"]),
    "plamo": dict(n_shared_head=2),
    "plamo2": dict(
        hidden_size_per_head=32,
        mamba_num_heads=4,
        mamba_d_state=16,
        mamba_chunk_size=32,
        full_attention_idx=[1],
    ),
    "rwkv7": dict(
        norm_eps=1e-5,
        a_low_rank_dim=8,
        v_low_rank_dim=8,
        gate_low_rank_dim=8,
        decay_low_rank_dim=8,
    ),
}


def build(name, **special):
    """The model of ``mlx_lm.models.<name>`` in fp32, the same at every call.

    Args:
        special: what its configuration has besides, or instead.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    for part in table.THROUGH.get(name, name).split(", "):
        if part in table.FAMILIES:
            described, family = (
                importlib.import_module(f"mlx_lm.models.{part}"),
                table.FAMILIES[part],
            )
            register(getattr(described, family.attention), described.__name__, family)
    mx.random.seed(zlib.crc32(name.encode()))
    config = {**COMMON, **SPECIAL.get(name, {}), **special, "model_type": name}
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    found = [attention_of(layer) for layer in model.layers]
    attentions = [(attention, family) for attention, family in found if family is not None]
    for attention, _ in attentions:
        attention.update(tree_map_with_path(_uneven, attention.parameters()))
    model.update(tree_map_with_path(_no_constant, model.parameters()))
    for attention, family in attentions:
        _enlarge_key_bias(attention, family)
    mx.eval(model.parameters())
    model.eval()
    return model


def _uneven(path, weight):
    """Queries, keys and values large enough for attention that is far from uniform."""
    return 2.5 * weight if weight.ndim == 2 and weight.dtype == mx.float32 else weight


def _enlarge_key_bias(attention, family):
    """A bias of keys, if there is any, that is larger than all the rest of them (Qwen2)."""
    try:
        projections = family.projections_of(attention)
    except ValueError:
        return
    keys = projections[min(1, len(projections) - 1)]
    if keys.bias() is not None:
        rows = slice(None) if keys.rows is None else keys.rows
        keys.linear.bias[rows] = 2.0 * mx.random.normal(keys.bias().shape)


def _no_constant(path, weight):
    """Norms and biases that are not all ones or zeros, and other weights not all zeros."""
    if weight.dtype == mx.float32 and (weight.ndim == 1 or not weight.any()):
        weight = weight + 0.2 * mx.random.normal(weight.shape)
    return weight

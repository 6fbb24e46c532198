"""A tiny model with random weights of every architecture that can be compressed."""

import importlib
import zlib

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

WINDOW = 48

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
QWEN3_5 = dict(
    num_hidden_layers=2, full_attention_interval=2, rope_parameters={"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
)

# What a model needs besides, or instead.
SPECIAL = {
    "Klear": {},
    "afmoe": dict(layer_types=SLIDING, num_dense_layers=1),
    "apertus": dict(post_norm=False, qk_norm=True),
    "baichuan_m1": dict(sliding_window_layers=[0], conv_window=2),
    "bailing_moe_linear": dict(layer_group_size=2, group_norm_size=1, num_key_value_heads=4),
    "cohere2": dict(sliding_window_pattern=2),
    "dbrx": dict(
        d_model=128,
        n_layers=2,
        n_heads=4,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    ),
    "deepseek": dict(intermediate_size=64),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2),
    "exaone": dict(num_layers=2),
    "exaone4": dict(rope_scaling=None, sliding_window_pattern="LG"),
    "exaone_moe": dict(layer_types=SLIDING, is_moe_layer=[False, True]),
    "falcon_h1": dict(
        mamba_d_ssm=64, mamba_d_head=32, mamba_n_heads=2, mamba_d_state=16, mamba_chunk_size=32
    ),
    "gear": dict(layer_types=SLIDING, query_pre_attn_scalar=32),
    "gemma3": dict(text_config=dict(COMMON, sliding_window_pattern=2, query_pre_attn_scalar=32, model_type="gemma3_text")),
    "gemma3_text": dict(sliding_window_pattern=2, query_pre_attn_scalar=32),
}


def config(name):
    return {**COMMON, **SPECIAL.get(name, {}), "model_type": name}


def build(name):
    """The model of ``mlx_lm.models.<name>``, in fp32, evaluated; the same at every call."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(zlib.crc32(name.encode()))
    model = module.Model(module.ModelArgs.from_dict(config(name)))
    model.set_dtype(mx.float32)
    model.update(tree_unflatten([(k, _livelier(k, v)) for k, v in tree_flatten(model.parameters())]))
    mx.eval(model.parameters())
    model.eval()
    return model


def _livelier(name, weight):
    """No constants, and attention that is far from uniform."""
    if weight.ndim < 2:
        weight = weight + 0.3 * mx.random.normal(weight.shape)
    return weight

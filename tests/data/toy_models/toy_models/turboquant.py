"""What the plugin must know about the toy model; the entry point names ``patch``."""

from mlx_turboquant_plugin.integration.attention import patch_family
from mlx_turboquant_plugin.integration.family import Family

TOY = Family(
    attention="ToyAttention",
    layer_attention="attention",
    layer_norm="norm",
    heads="heads",
    kv_heads="kv_heads",
    projections=("wq", "wk", "wv"),
    rope="rotary",
)


def patch(module):
    patch_family(module, TOY)

"""The tables of docs/models.md; run this file to write them anew."""

from pathlib import Path

import tiny_models
from mlx_lm.models import cache as mlx_lm_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.integration import prompt_cache, table
from mlx_turboquant_plugin.integration.family import attention_of, layers_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
START, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
LAYERS = {
    "KVCache": "full attention",
    "RotatingKVCache": "sliding attention",
    "ChunkedKVCache": "chunked attention",
    "ArraysCache": "recurrent or convolution",
    "CacheList": "attention beside a state",
}


def markdown():
    """The tables, as what becomes of a tiny model of every architecture says."""
    names = sorted([*table.FAMILIES, *table.THROUGH], key=str.lower)
    lines = ["| model | compressed layers | keys | other layers |", "| --- | --- | --- | --- |"]
    lines += map(_row, names)
    lines += ["", "| model | why it runs uncompressed |", "| --- | --- |"]
    lines += [f"| {n} | {why} |" for n, why in sorted(table.UNSUPPORTED.items())]
    return "\n".join(lines) + "\n"


def _row(name):
    model = tiny_models.build(name)
    mlx_turboquant_plugin.disable()
    stock = mlx_lm_cache.make_prompt_cache(model)
    # Or the windows of tiny models would lie within what stays in full precision.
    mlx_turboquant_plugin.enable(window=32)
    made = mlx_lm_cache.make_prompt_cache(model)
    [report] = [line for line in prompt_cache.report() if line.startswith(f"{model.model_type}: ")]
    kinds, codecs = [], []
    for layer, before, after in zip(layers_of(model), stock, made):
        parts = getattr(after, "caches", [after])
        codecs += [one.codec for one in parts if hasattr(one, "codec")]
        if any(hasattr(one, "codec") for one in parts):
            latent = attention_of(layer)[1].latent
            kinds.append("latents" if latent else LAYERS[type(before).__name__])
    knows = []
    if any(codec.balance is not None for codec in codecs):
        knows.append("balanced")
    if any(codec.bias is not None for codec in codecs):
        knows.append("centred")
    # Now that the codecs have learned: they measure only while it is on.
    mlx_turboquant_plugin.disable()
    through = f" (through {table.THROUGH[name]})" if name in table.THROUGH else ""
    _, _, others = report.partition("; the others not: ")
    return (
        f"| {name}{through} | {', '.join(dict.fromkeys(kinds))} | {', '.join(knows)} | {others} |"
    )


def replaced(page):
    """The text of the page with new tables."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + markdown() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text("utf-8")), "utf-8")

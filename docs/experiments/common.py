"""What the experiments share: caches with changed codecs, and their KL on a text."""

import argparse
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_turboquant_plugin.codecs.kv_codec import KVCodec
from mlx_turboquant_plugin.tools.arguments import add_text_arguments, read_windows
from mlx_turboquant_plugin.tools.runs import (
    compressed,
    compressed_prompt_cache,
    load_model,
    prompt_cache,
)
from mlx_turboquant_plugin.tools.teacher_forcing import Divergence, join, lockstep

# From the index of a layer and its codec to the codec that it gets instead.
Change = Callable[[int, KVCodec], KVCodec]


def load(description: str):
    """The model in fp32, the windows of text and the arguments of the command line."""
    parser = argparse.ArgumentParser(description=description)
    add_text_arguments(parser, windows=2)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    windows = read_windows(args, model, tokenizer)
    model.set_dtype(mx.float32)
    return model, windows, args


def changed_caches(model: nn.Module, change: Change) -> list[Any]:
    """Compressed caches whose codecs are ``change(index, codec)``; inside ``compressed()``."""
    caches = compressed_prompt_cache(model)
    for index, (layer, cache) in enumerate(zip(model.layers, caches)):
        cache.codec = change(index, cache.codec)
        cache.biased = cache.codec.bias is not None
        # Bound already, so that it does not adopt the codec that its layer would have.
        cache.attention = weakref.ref(layer.self_attn)
    return caches


def measure(
    model: nn.Module, windows, chunk: int, arms: Mapping[str, Change], **settings: Any
) -> dict[str, Divergence]:
    """The divergence of each arm from the exact run, over all windows."""
    found: dict[str, list[Divergence]] = {name: [] for name in arms}

    def forward(caches):
        return lambda inputs: model(inputs[None], cache=caches)[0]

    for window in windows:
        exact = forward(prompt_cache(model))
        with compressed(invariant=True, **settings):
            runs = [forward(changed_caches(model, change)) for change in arms.values()]
            for name, part in zip(arms, lockstep(exact, runs, mx.array(window), chunk)):
                found[name].append(part)
    return {name: join(parts) for name, parts in found.items()}

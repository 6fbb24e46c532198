"""``mlx_turboquant drift``: which layer, head and side of the cache loses how much.

The exact run's own queries, keys and values of each layer are put through that layer's
codec, so that the errors of one layer do not reach the next: every figure is the layer's
own. What a layer's error does to the model's output is another matter; the mean KL with
that layer compressed alone tells.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ..activation import disable
from ..cache import CompressedKVCache, Visibility
from ..codecs.kv_codec import KVCodec
from ..interrupts import uninterrupted
from ..rules import SettingsError
from .arguments import (
    add_json_argument,
    add_preset_argument,
    add_text_arguments,
    read_windows,
)
from .arms import EXACT, PRESET_ARMS, Arm, Run, not_measured
from .output import as_json, check_distinct, lacking, show, with_notes
from .progress import progress
from .runs import load_model, prompt_cache
from .teacher_forcing import lockstep

# A layer that costs so many times the median of all layers deserves more bits.
OUTSTANDING = 2.0


@dataclass(frozen=True)
class HeadDrift:
    """The errors of one KV head, over all its query heads and all positions that read codes.

    Attributes:
        score: root mean square error of q . k * scale over quantized keys, weighted by the
            attention paid to each and without its mean per query, which softmax ignores.
        keys, values, both: |error| / |output| of the attention output, root mean squares,
            with this side of the cache as codes.
    """

    layer: int
    head: int
    score: float
    keys: float
    values: float
    both: float


@dataclass(frozen=True)
class LayerDrift:
    """One layer: its heads together as in :class:`HeadDrift`, and the mean KL of the model."""

    layer: int
    score: float
    keys: float
    values: float
    both: float
    kl: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_text_arguments(parser, windows=1)
    add_preset_argument(parser)
    parser.add_argument("--heads", action="store_true", help="a line for each KV head, too")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure every layer and print a table.

    Returns:
        0; what is wrong with the arguments is raised as SettingsError.
    """
    check_distinct(args.model, json=args.json, text=args.text, tokens=args.tokens)
    disable()  # TURBOQUANT=1 would compress the exact run too
    loaded, arm = load_model(args.model, args.tokens is None), PRESET_ARMS[args.preset]
    model = loaded.model
    windows = read_windows(args, model, loaded.tokenizer)
    notes = not_measured(model, arm.settings)
    notes += loaded.beyond_context(args.length, "--length has")
    model.set_dtype(mx.float32)
    found: tuple[int, list, list] = 0, [], []
    try:
        for count, errors in enumerate(measure(model, windows, args.chunk, arm), 1):
            found = count, *errors
    finally:
        # Also after Ctrl-C.
        count, heads, layers = found
        if count:
            with uninterrupted():
                report = with_notes(
                    notes,
                    lacking(count, args.windows, "windows"),
                    preset=args.preset,
                    settings=arm.described,
                    heads=[asdict(h) for h in heads],
                    layers=[asdict(x) for x in layers],
                )
                show(_lines(args, report["notes"], *found), (args.json, lambda: as_json(report)))
    return 0


def measure(
    model: nn.Module, windows: list[np.ndarray], chunk: int, arm: Arm
) -> Iterator[tuple[list[HeadDrift], list[LayerDrift]]]:
    """The errors of every KV head and of every layer, over the windows so far: after each.

    Yields:
        HeadDrift of each head, and LayerDrift of each compressed layer.

    Raises:
        SettingsError: the windows are too short to read codes, or the model can't be compressed.
    """
    with arm.on():
        codecs = arm.caches(model)
    probed = [i for i, c in enumerate(codecs) if isinstance(c, CompressedKVCache)]
    length, visibility = len(windows[0]), codecs[probed[0]].visibility
    if visibility.full_from(length - 1) <= visibility.sinks:
        raise SettingsError(
            f"--length is {length}, and no token of so short a text is read as a code: choose more "
            f"than {visibility.window + visibility.sinks + 32}"
        )
    sums: dict[int, list[np.ndarray]] = {i: [] for i in probed}
    kls = []
    with progress(len(windows) * length * (2 + len(probed)), "tokens") as bar:
        for window in windows:
            tokens = mx.array(window)
            caches = prompt_cache(model)
            for i in probed:
                caches[i] = Probe(codecs[i].codec, codecs[i].visibility)
            with _queries_seen(model):
                for start in range(0, tokens.size, chunk):
                    inputs = tokens[start : start + chunk]
                    mx.eval(model(inputs[None], cache=caches), [cache.state for cache in caches])
                    bar.update(inputs.size)
            runs = [Run(arm.only(i), model) for i in probed]
            parts = lockstep(Run(EXACT, model), runs, tokens, chunk, bar.update)
            kls.append([part.kl for part in parts])
            for i in probed:
                sums[i].append(caches[i].sums)
            yield _drifts(sums, np.mean(kls, axis=0))


def _drifts(
    sums: dict[int, list[np.ndarray]], kls: np.ndarray
) -> tuple[list[HeadDrift], list[LayerDrift]]:
    """The sums of each window, by layer, and the mean KL of each layer, as ratios."""
    heads, layers = [], []
    for (i, found), kl in zip(sums.items(), kls, strict=True):
        total = np.sum(found, axis=0)
        heads += [HeadDrift(i, head, *_ratios(row)) for head, row in enumerate(total)]
        score, keys, values, both = _ratios(total.sum(axis=0))
        layers.append(LayerDrift(i, score, keys, values, both, float(kl)))
    return heads, layers


def _ratios(sums: np.ndarray) -> list[float]:
    score, keys, values, both, output, queries = sums
    return [
        float(x) for x in np.sqrt([score / queries, *(np.array([keys, values, both]) / output)])
    ]


class Probe(KVCache):
    """A KVCache that also knows what its codec makes of each token.

    Attributes:
        sums: (H, 6) of each KV head: squared errors of scores, of the output by keys,
            values and both, the squared output, and the number of queries.
    """

    def __init__(self, codec: KVCodec, visibility: Visibility):
        super().__init__()
        self.codec, self.visibility = codec, visibility
        self.sums: Any = 0.0
        self._decoded: list[KVCache] = [KVCache()]

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        decoded = (
            self.codec.decode_keys(self.codec.encode_keys(keys, self.offset), self.offset),
            self.codec.decode_values(self.codec.encode_values(values)),
        )
        self._decoded[0].update_and_fetch(*decoded)
        return super().update_and_fetch(keys, values)

    def observe(self, queries: mx.array, scale: float) -> None:
        """Add the errors of the newest queries (1, H_q, N, D), one for each newest token."""
        exact_keys, exact_values = self.keys_and_values()
        count, kv_heads = queries.shape[2], exact_keys.shape[1]
        start = self.offset - count
        positions = mx.arange(start, self.offset)[:, None]
        tokens = mx.arange(self.offset)
        begins = mx.array(
            [self.visibility.full_from(p) for p in range(start, self.offset)], mx.int32
        )[:, None]
        quantized = (tokens >= self.visibility.sinks) & (tokens < begins)
        reads = mx.any(quantized, axis=-1)[:, None].astype(mx.float32)
        quantized_keys, quantized_values = self._decoded[0].keys_and_values()
        # (H, query heads of a KV head, N, D), against (H, 1, T, D).
        q = queries[0].reshape(kv_heads, -1, count, queries.shape[-1]) * scale
        k, quantized_k, v, quantized_v = (
            x[0][:, None] for x in (exact_keys, quantized_keys, exact_values, quantized_values)
        )
        hidden = mx.where(tokens <= positions, 0.0, -mx.inf)
        exact = q @ mx.swapaxes(k, -1, -2)
        missing = mx.where(quantized, q @ mx.swapaxes(quantized_k, -1, -2) - exact, 0.0)
        weights = mx.softmax(exact + hidden, axis=-1)
        shifted = mx.softmax(exact + missing + hidden, axis=-1)

        def attended(p: mx.array, of_codes: bool) -> mx.array:
            if not of_codes:
                return p @ v
            return mx.where(quantized, p, 0.0) @ quantized_v + mx.where(quantized, 0.0, p) @ v

        output = attended(weights, False)
        mean = mx.sum(weights * missing, axis=-1, keepdims=True)
        spread = mx.sum(weights * (missing - mean) ** 2, axis=-1, keepdims=True)
        errors = [
            attended(p, codes) - output
            for p, codes in ((shifted, False), (weights, True), (shifted, True))
        ]
        squares = [spread, *(e**2 for e in errors), output**2, mx.ones_like(spread)]
        self.sums = self.sums + np.stack(
            [np.array(mx.sum(x * reads, axis=(1, 2, 3)), np.float64) for x in squares], axis=-1
        )


@contextmanager
def _queries_seen(model: nn.Module) -> Iterator[None]:
    """Meanwhile the attention of ``model`` shows its queries to each :class:`Probe`."""
    name = "scaled_dot_product_attention"
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    originals = {module: getattr(module, name) for module in modules if hasattr(module, name)}

    def observed(original):
        def attention(queries, keys, values, cache, scale, *args, **kwargs):
            if isinstance(cache, Probe):
                cache.observe(queries, scale)
            return original(queries, keys, values, cache, scale, *args, **kwargs)

        return attention

    for module, original in originals.items():
        setattr(module, name, observed(original))
    try:
        yield
    finally:
        for module, original in originals.items():
            setattr(module, name, original)


def outstanding(layers: list[LayerDrift]) -> list[LayerDrift]:
    """The layers whose KL is more than twice the median of all layers'."""
    limit = OUTSTANDING * statistics.median(layer.kl for layer in layers)
    return [layer for layer in layers if layer.kl > limit]


def _lines(
    args: argparse.Namespace,
    notes: list[str],
    windows: int,
    heads: list[HeadDrift],
    layers: list[LayerDrift],
) -> Iterator[str]:
    yield (
        f"{args.model}, preset {args.preset}: {windows} x {args.length} tokens in chunks of "
        f"{args.chunk}, weights in float32"
    )
    yield from notes
    yield "errors of each layer's own attention; KL of the model with that layer alone compressed"
    yield ""
    yield (
        f"{'layer':>5} {'head':>5} {'score, nats':>12} {'keys':>7} {'values':>7} {'both':>7} "
        f"{'mean KL, nats':>14}"
    )
    for layer in layers:
        yield f"{_row(layer.layer, 'all', layer)} {layer.kl:>14.1e}"
        if args.heads:
            yield from (_row("", h.head, h) for h in heads if h.layer == layer.layer)
    yield ""
    found = outstanding(layers)
    if found:
        for layer in found:
            side = "keys" if layer.keys > layer.values else "values"
            yield (
                f"layer {layer.layer} costs {layer.kl / sum(x.kl for x in layers):.0%} of the sum "
                f"of all layers' KL, most of it through its {side}"
            )
    else:
        yield f"no layer costs more than {OUTSTANDING:g} times the median of all"


def _row(layer: Any, head: Any, drift: Any) -> str:
    return (
        f"{layer!s:>5} {head!s:>5} {drift.score:>12.4f} {drift.keys:>7.2%} {drift.values:>7.2%} "
        f"{drift.both:>7.2%}"
    )

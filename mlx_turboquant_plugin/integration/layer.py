"""What a cache needs to know about an attention layer.

Shapes, types and settings say what its cache is like. What its weights say is read when the
first codes are written: a cache that never needs any costs nothing.
"""

import functools
import json
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import compiling
from ..backends.choice import resolve_kernel
from ..cache import Visibility
from ..cache.reading import Reading, reading_of
from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import SEGMENTED, CodecSpec, Knowledge, KVCodec
from ..rules import PRESETS
from ..settings import Configuration, Settings, in_force
from .balance import WHITENED, balance, layout, norm_rms, projection_rms, query_squares
from .calibration import same_objects, statistics_for
from .calibration_file import Statistics
from .family import Family, family_of
from .projections import Projection, contents

# Codec and bits of the part of keys with rotary positions beside a latent: a ninth of it.
ROTARY_PART = "affine", 8


class Fingerprint:
    """As a string it tells a layer from others, by a part of its weights.

    These are read when they are asked for, and not held.
    """

    def __init__(self, linear: nn.Module):
        self._linear = weakref.ref(linear)

    @functools.cached_property
    def _text(self) -> str:
        linear = self._linear()
        if linear is None:
            return ""
        return f"{zlib.crc32(bytes(linear.weight[:1].view(mx.uint8))):08x}"

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Layer:
    """One attention layer as its caches see it: without its weights, which these may outlive."""

    codec: KVCodec
    visibility: Visibility
    kernel: str
    fingerprint: Fingerprint
    settings: Settings
    configuration: Configuration
    rope: Any
    reading: Reading

    def key_bias(self, bias: mx.array) -> KeyBias:
        """A bias (H, D) of this layer's keys."""
        return KeyBias(bias, self.rope)


class _Known(NamedTuple):
    """A layer and what it was made of."""

    attention: weakref.ref
    norm: nn.Module | None
    parts: tuple[Any, ...]
    layer: Layer


_layers: dict[int, _Known] = {}


def known_layer(
    attention: nn.Module,
    norm: nn.Module | None = None,
    settings: Settings | None = None,
) -> Layer:
    """The layer of an attention module, made again if its weights or settings changed.

    Args:
        norm: the norm before it, None for the one it is known with; without one, without norms
            of its heads and without statistics, its keys are not balanced.
        settings: None stands for the settings it is known with, if they are still in force,
            or the general ones.

    Raises:
        ValueError: its keys and values can't be compressed.
    """
    key = id(attention)
    known = _layers.get(key)
    if known is not None and known.attention() is not attention:
        known = None
    if known is not None:
        norm = known.norm if norm is None else norm
        if known.layer.configuration is in_force():
            settings = settings or known.layer.settings
    settings = settings or _general()
    parts = _parts(attention, norm)
    if known is not None and settings == known.layer.settings and same_objects(parts, known.parts):
        layer = known.layer
        if layer.configuration is not in_force():
            layer = replace(layer, configuration=in_force())
            _layers[key] = known._replace(layer=layer)
        return layer
    layer = _read_layer(attention, norm, settings)
    reference = weakref.ref(attention, lambda _: _layers.pop(key, None))
    _layers[key] = _Known(reference, norm, parts, layer)
    return layer


def _general() -> Settings:
    """The settings of a layer that nobody knows the model and the place of."""
    general = in_force().general
    preset = PRESETS[general.preset]
    bits = {name: preset[name] for name in preset if isinstance(getattr(general, name), tuple)}
    return replace(general, **bits)


def _parts(attention: nn.Module, norm: nn.Module | None) -> tuple[Any, ...]:
    """What is replaced when a layer is loaded, quantized, sharded, trained or adapted."""
    # Not the attention itself, which nobody here may keep.
    return (norm, *contents(attention), *(() if norm is None else contents(norm)))


def _read_layer(attention: nn.Module, norm: nn.Module | None, settings: Settings) -> Layer:
    family = family_of(attention)
    obstacle = family.obstacle(attention)
    if obstacle:
        raise ValueError(obstacle)
    projections = family.projections_of(attention)
    head_dim, value_dim = _head_dims(family, attention, projections)
    exact = settings.bypass == "identity"
    spec = CodecSpec(head_dim, value_dim, *_codecs(family, settings, head_dim))
    rope = _rope_of(family, attention)
    if _has_bias(family, attention) and type(rope) not in (nn.RoPE, type(None)):
        # Whether it could be taken out of the keys does not depend on what it is.
        KeyBias(mx.ones((1, head_dim)), rope)
    if not compiling.problem() and not exact:
        compiling.prepare(json.dumps(spec))
    found = weakref.ref(attention), None if norm is None else weakref.ref(norm)
    linear = projections[min(1, len(projections) - 1)].linear
    return Layer(
        KVCodec.learning(spec, functools.partial(_learn, *found, settings.balance)),
        Visibility(settings.window, settings.sinks, settings.invariant),
        settings.bypass if settings.bypass == "bridge" else resolve_kernel(settings.kernel),
        Fingerprint(linear),
        settings,
        in_force(),
        rope,
        reading_of(
            attention,
            type(attention).__module__.rpartition(".")[2],
            family.casts_keys,
            family.reads_arrays or family.shared(attention),
            family.follows is not None,
        ),
    )


def _learn(
    attention_found: Callable[[], nn.Module | None],
    norm_found: Callable[[], nn.Module | None] | None,
    balanced: bool,
    spec: CodecSpec,
) -> Knowledge:
    """What there is to know of a layer, by its statistics or its weights.

    Nothing, if its model is gone.
    """
    attention = attention_found()
    if attention is None:
        return Knowledge()
    family = family_of(attention)
    statistics = None
    if spec.key_codec != "exact":
        tried, statistics = statistics_for(attention)
        if not tried:
            # Codecs to come may learn more.
            _layers.pop(id(attention), None)
    norm = norm_found and norm_found()
    rms, bias, measured = _rms_and_bias(family, attention, norm, spec.head_dim, statistics)
    rope = _rope_of(family, attention)
    cut = layout(*rms, rope) if rms and spec.segments > 1 else None
    # Weights say too little of what queries tell apart.
    fed_back = measured and cut is not None
    factors = balance(*rms, rope, WHITENED * fed_back) if rms and balanced else None
    squares = query_squares(rms[0], rms[1], rope) if rms and fed_back else None
    mx.eval([x for x in (factors, cut, squares) if x is not None])
    return Knowledge(factors, bias, cut, squares)


def _rope_of(family: Family, attention: nn.Module) -> Any:
    return None if family.dims else getattr(attention, family.rope, None)


def _has_bias(family: Family, attention: nn.Module) -> bool:
    """Whether keys have a bias that is the same for every token, but for RoPE."""
    if family.dims or getattr(attention, family.head_norms[1], None) is not None:
        # What a norm makes of a bias is not.
        return False
    return family.projections_of(attention)[1].bias() is not None


def _head_dims(
    family: Family, attention: nn.Module, projections: tuple[Projection, ...]
) -> tuple[int, int]:
    if family.dims:
        dims = tuple(getattr(attention, name) for name in family.dims)
    else:
        _, kv_heads = family.head_counts(attention)
        # Models that make values of their keys have no third projection.
        dims = tuple(x.outputs // kv_heads for x in (projections[1], projections[-1]))
    for dim in dims:
        if dim % 8 or not 32 <= dim <= 512:
            raise ValueError(
                f"head dim {dim} can't be compressed; allowed are multiples of 8 from 32 to 512"
            )
    return dims


def _codecs(family: Family, settings: Settings, head_dim: int) -> tuple[Any, ...]:
    """Of keys and of values the codec and its bits."""
    if settings.bypass == "identity":
        return "exact", settings.key_bits, "exact", settings.value_bits
    if family.latent:
        return settings.key_codec, settings.key_bits, *ROTARY_PART
    key = key_codec(settings, head_dim), settings.key_bits
    return *key, settings.value_codec, settings.value_bits


def key_codec(settings: Settings, head_dim: int) -> str:
    """What the codec of the settings comes to: keys of 4 bits are cut in two where they can be."""
    if (settings.key_codec, settings.key_bits) == ("lloyd-max", 4) and head_dim % 16 == 0:
        return SEGMENTED
    return settings.key_codec


def _rms_and_bias(
    family: Family,
    attention: nn.Module,
    norm: nn.Module | None,
    head_dim: int,
    statistics: Statistics | None,
) -> tuple[tuple[mx.array, mx.array] | None, KeyBias | None, bool]:
    """Root mean squares of what is quantized of keys, (H, D), and of queries, (H_q, D), and the
    bias of the keys, where there are any; and whether they were measured."""
    heads, kv_heads = family.head_counts(attention)
    rope = getattr(attention, family.rope, None)
    shapes = (kv_heads, head_dim), (heads, head_dim)
    if statistics is not None and tuple(x.shape for x in statistics[1:]) != shapes:
        statistics = None
    if statistics is not None and (statistics.mean is not None or family.dims):
        measured = mx.sqrt(statistics[1]), mx.sqrt(statistics[2])
        try:
            bias = None if statistics.mean is None else KeyBias(statistics.mean, rope)
            return measured, bias, True
        except ValueError:
            # The rope is another one than when this was measured; the weights have to do.
            pass
    if family.dims:
        return None, None, False
    norms: list[Any] = [getattr(attention, name, None) for name in family.head_norms]
    query_norm, key_norm = norms
    bias = rms = None
    if key_norm is not None:
        rms = norm_rms(key_norm, kv_heads, head_dim), norm_rms(query_norm, heads, head_dim)
    else:
        queries, keys, *_ = family.projections_of(attention)
        key_bias = keys.bias()
        if key_bias is not None:
            bias = KeyBias(key_bias.reshape(kv_heads, -1), rope)
        if norm is not None:
            rms = (
                projection_rms(keys, norm, kv_heads),
                projection_rms(queries, norm, heads, biased=True),
            )
    return rms, bias, False

"""What a cache needs to know about an attention layer, read from its weights."""

import json
import weakref
import zlib
from dataclasses import dataclass, replace
from typing import Any, Dict, Optional, Tuple

import mlx.core as mx
import mlx.nn as nn

from .. import compiling
from ..attention.dispatch import BRIDGE
from ..attention.kernels import resolve_kernel
from ..cache import Visibility
from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec
from ..rules import PRESETS
from ..settings import Configuration, Settings, in_force
from .balance import balance, layout, norm_rms, projection_rms
from .calibration_file import Statistics
from .family import Family, family_of
from .projections import Projection, base_linear


@dataclass(frozen=True)
class Layer:
    """One attention layer as its caches see it."""

    codec: KVCodec
    visibility: Visibility
    kernel: str
    fingerprint: str
    settings: Settings
    configuration: Configuration
    norm: Optional[nn.Module]
    statistics: Optional[Statistics]
    weights: Tuple[Any, ...]
    rope: Any

    def key_bias(self, bias: mx.array) -> KeyBias:
        """A bias (H, D) of this layer's keys."""
        return KeyBias(bias, self.rope)


_layers: Dict[int, Tuple[weakref.ref, Layer]] = {}


def known_layer(
    attention: nn.Module,
    norm: Optional[nn.Module] = None,
    settings: Optional[Settings] = None,
    statistics: Optional[Statistics] = None,
) -> Layer:
    """The layer of an attention module, made again if its weights or settings changed.

    Args:
        norm: the norm before it, None for the one it is known with; without one, and
            without norms of its heads, its keys are not balanced.
        settings: None stands for the settings it is known with, if they are still in force,
            or the general ones.
        statistics: of its keys and queries; None for those it is known with. Without any the
            weights have to do.

    Raises:
        ValueError: its keys and values can't be compressed.
    """
    reference, layer = _layers.get(id(attention), (None, None))
    known = reference is not None and reference() is attention
    if known:
        norm = norm or layer.norm
        same = all(a is b for a, b in zip(layer.weights, replaceable(attention)))
        statistics = statistics or (layer.statistics if same else None)
        if layer.configuration is in_force():
            settings = settings or layer.settings
    settings = settings or _general()
    if known and same and norm is layer.norm and settings == layer.settings:
        if statistics is layer.statistics:
            if layer.configuration is not in_force():
                layer = replace(layer, configuration=in_force())
                _layers[id(attention)] = reference, layer
            return layer
    layer = _read_layer(attention, norm, settings, statistics)
    key = id(attention)
    _layers[key] = (weakref.ref(attention, lambda _: _layers.pop(key, None)), layer)
    return layer


def _general() -> Settings:
    """The settings of a layer that nobody knows the model and the place of."""
    general = in_force().general
    preset = PRESETS[general.preset]
    bits = {name: preset[name] for name in preset if isinstance(getattr(general, name), tuple)}
    return replace(general, **bits)


def replaceable(attention: nn.Module) -> Tuple[Any, ...]:
    """What is replaced when a layer is loaded, quantised, sharded or adapted."""
    names = family_of(attention).projections[:2]
    linears = [base_linear(attention[name]) for name in names if name in attention]
    return (*linears, *(x.weight for x in linears), *(x.get("bias") for x in linears))


def _read_layer(
    attention: nn.Module,
    norm: Optional[nn.Module],
    settings: Settings,
    statistics: Optional[Statistics],
) -> Layer:
    family = family_of(attention)
    obstacle = family.obstacle(attention)
    if obstacle:
        raise ValueError(obstacle)
    projections = family.projections_of(attention)
    head_dim, value_dim = _head_dims(family, attention, projections)
    exact = settings.bypass == "identity"
    spec = CodecSpec(
        head_dim,
        value_dim,
        "exact" if exact else key_codec(settings, head_dim),
        settings.key_bits,
        "exact" if exact else settings.value_codec,
        settings.value_bits,
    )
    if not compiling.problem() and not exact:
        compiling.prepare(json.dumps(spec))
    rms, bias = _rms_and_bias(
        family, attention, norm, projections, head_dim, statistics
    )
    rope = None if family.dims else getattr(attention, family.rope, None)
    factors = balance(*rms, rope) if rms and settings.balance else None
    cut = layout(*rms, rope) if rms and spec.segments > 1 else None
    mx.eval([x for x in (factors, cut) if x is not None])
    linear = projections[min(1, len(projections) - 1)].linear
    return Layer(
        KVCodec(spec, factors, bias, cut),
        Visibility(settings.window, settings.sinks, settings.invariant),
        BRIDGE if settings.bypass == BRIDGE else resolve_kernel(settings.kernel),
        f"{zlib.crc32(bytes(linear.weight[:1].view(mx.uint8))):08x}",
        settings,
        in_force(),
        norm,
        statistics,
        replaceable(attention),
        rope,
    )


def _head_dims(
    family: Family, attention: nn.Module, projections: Tuple[Projection, ...]
) -> Tuple[int, int]:
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


def key_codec(settings: Settings, head_dim: int) -> str:
    """What the codec of the settings comes to: 4 bits are 5 and 3 where keys can be cut in two."""
    if (settings.key_codec, settings.key_bits) == ("lloyd-max", 4) and head_dim % 16 == 0:
        return SEGMENTED
    return settings.key_codec


def _rms_and_bias(
    family: Family,
    attention: nn.Module,
    norm: Optional[nn.Module],
    projections: Tuple[Projection, ...],
    head_dim: int,
    statistics: Optional[Statistics],
) -> Tuple[Optional[Tuple[mx.array, mx.array]], Optional[KeyBias]]:
    """Root mean squares of what is coded of keys, (H, D), and of queries, (H_q, D), and the bias
    of the keys, where there are any."""
    heads, kv_heads = family.head_counts(attention)
    rope = getattr(attention, family.rope, None)
    shapes = (kv_heads, head_dim), (heads, head_dim)
    if statistics is not None and tuple(x.shape for x in statistics[1:]) != shapes:
        statistics = None
    if statistics is not None and (statistics.mean is not None or family.dims):
        mean = statistics.mean
        rms = tuple(map(mx.sqrt, statistics[1:]))
        return rms, None if mean is None else KeyBias(mean, rope)
    if family.dims:
        return None, None
    query_norm, key_norm = (getattr(attention, name, None) for name in family.head_norms)
    bias = rms = None
    if key_norm is not None:
        # What a norm makes of a bias is not the same for every token.
        rms = norm_rms(key_norm, kv_heads, head_dim), norm_rms(query_norm, heads, head_dim)
    else:
        queries, keys, *_ = projections
        if keys.bias() is not None:
            bias = KeyBias(keys.bias().reshape(kv_heads, -1), rope)
        if norm is not None:
            rms = (
                projection_rms(keys, norm, kv_heads),
                projection_rms(queries, norm, heads, biased=True),
            )
    return rms, bias

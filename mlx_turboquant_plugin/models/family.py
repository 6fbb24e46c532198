"""What all supported architectures have in common: patching, and reading a layer."""

import weakref
import zlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Tuple

import mlx.core as mx
import mlx.nn as nn

from .. import patching
from ..attention.dispatch import BRIDGE, attend
from ..attention.kernels import resolve_kernel
from ..cache import BatchCompressedKVCache, CompressedKVCache, Visibility
from ..codecs.kv_codec import CodecSpec, KVCodec
from ..codecs.key_bias import KeyBias
from ..settings import Settings
from .balance import balance, base_linear


@dataclass(frozen=True)
class Family:
    """One architecture: which attributes of a layer hold what.

    Attributes:
        channel_rms: ``f(attention, norm, "q_proj" or "k_proj", heads)`` gives the
            root mean square of the channels, see :mod:`balance`.
        attention: the name of the attention class in the model's module, and
        layer_attention, layer_norm: of a layer's attention and of the norm before it.
    """

    channel_rms: Callable[[nn.Module, nn.Module, str, int], mx.array]
    attention: str = "Attention"
    layer_attention: str = "self_attn"
    layer_norm: str = "input_layernorm"


_families: Dict[type, Family] = {}


def patch_family(module: ModuleType, family: Family) -> None:
    """Let the models of ``module`` attend over compressed caches.

    Replaces the module's name ``scaled_dot_product_attention``, and wraps the
    attention class's ``__call__`` so that a cache learns which layer it serves.

    Raises:
        AttributeError: the module does not have what the family describes.
    """
    attention = getattr(module, family.attention)
    patching.wrap(module, "scaled_dot_product_attention", _scaled_dot_product_attention)
    patching.wrap(attention, "__call__", _attention_call)
    _families[attention] = family


def family_of(attention: Any) -> Optional[Family]:
    """The family of an attention module, or None if its class is not patched."""
    return _families.get(type(attention))


def _scaled_dot_product_attention(wrapped, instance, args, kwargs):
    return attend(wrapped, *args, **kwargs)


def _attention_call(wrapped, instance, args, kwargs):
    cache = kwargs["cache"] if "cache" in kwargs else args[2] if len(args) > 2 else None
    if not isinstance(cache, (CompressedKVCache, BatchCompressedKVCache)):
        return wrapped(*args, **kwargs)
    if cache.attention is None or cache.attention() is not instance:
        layer = known_layer(instance)
        cache.bind(layer.codec, layer.fingerprint, layer.kernel)
        cache.attention = weakref.ref(instance)
    cache.attending = True
    try:
        return wrapped(*args, **kwargs)
    finally:
        cache.attending, cache.view = False, None


@dataclass(frozen=True)
class Layer:
    """What a cache needs to know about one attention layer."""

    codec: KVCodec
    visibility: Visibility
    kernel: str
    fingerprint: str
    settings: Settings
    weights: Tuple[Any, ...]


_layers: Dict[int, Tuple[weakref.ref, Layer]] = {}


def known_layer(
    attention: nn.Module, norm: Optional[nn.Module] = None, settings: Optional[Settings] = None
) -> Layer:
    """The layer of an attention module, made again if its weights or settings changed.

    Args:
        norm: the norm before it; without one its keys are not balanced.
        settings: None stands for the settings it is known with, or the defaults.

    Raises:
        ValueError: its keys and values can't be compressed.
    """
    reference, layer = _layers.get(id(attention), (None, None))
    if reference is not None and reference() is attention:
        same = all(a is b for a, b in zip(layer.weights, _weights(attention)))
        if same and settings in (None, layer.settings):
            return layer
    layer = _read_layer(attention, norm, settings or Settings())
    key = id(attention)
    _layers[key] = (weakref.ref(attention, lambda _: _layers.pop(key, None)), layer)
    return layer


def _weights(attention: nn.Module) -> Tuple[Any, ...]:
    linear = base_linear(attention.k_proj)
    return linear.weight, linear.get("bias"), attention.q_proj


def _read_layer(attention: nn.Module, norm: Optional[nn.Module], settings: Settings) -> Layer:
    family = _families[type(attention)]
    heads = attention.n_kv_heads
    linear = base_linear(attention.k_proj)
    head_dim = linear.weight.shape[0] // heads
    value_dim = base_linear(attention.v_proj).weight.shape[0] // heads
    for dim in (head_dim, value_dim):
        if dim % 8 or not 32 <= dim <= 512:
            raise ValueError(
                f"head dim {dim} can't be compressed; allowed are multiples of 8 from 32 to 512"
            )
    rope = getattr(attention, "rope", None)
    bias = linear.get("bias")
    factors = None
    if settings.balance and norm is not None:
        factors = balance(
            family.channel_rms(attention, norm, "k_proj", heads),
            family.channel_rms(attention, norm, "q_proj", attention.n_heads),
            rope,
        )
        mx.eval(factors)
    exact = settings.bypass == "identity"
    spec = CodecSpec(
        head_dim,
        value_dim,
        "exact" if exact else settings.key_codec,
        settings.key_bits,
        "exact" if exact else settings.value_codec,
        settings.value_bits,
    )
    codec = KVCodec(
        spec, factors, None if bias is None else KeyBias(bias.reshape(heads, -1), rope)
    )
    return Layer(
        codec,
        Visibility(settings.window, settings.sinks),
        BRIDGE if settings.bypass == BRIDGE else resolve_kernel(settings.kernel),
        f"{zlib.crc32(bytes(linear.weight[:1].view(mx.uint8))):08x}",
        settings,
        _weights(attention),
    )

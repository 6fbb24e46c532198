"""Which codec a cache goes on with when it meets the attention module that uses it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import KVCodec
from .state import check_fits

if TYPE_CHECKING:
    from .compressed import CompressedKVCache


def codec_of(
    cache: "CompressedKVCache",
    codec: KVCodec,
    fingerprint: Any,
    place: Callable[[mx.array], KeyBias],
) -> KVCodec:
    """The module's ``codec``, or what of it ``cache`` can still take.

    A cache that holds codes keeps the codec that it has, and so does one that this very layer
    has filled and that knows its statistics. An empty one keeps its bits: other settings may have
    come into force since it was made.

    Args:
        fingerprint: of the module; read only if the cache is filled.
        place: from a key bias (H, D) to one that turns as this module's keys do.

    Raises:
        ValueError: the cache was filled by another model.
    """
    own = cache.codec
    if cache.empty():
        same_dims = own is not None and own.spec.dims == codec.spec.dims
        return codec.with_spec(own.spec) if same_dims else codec
    check_fits(cache, codec, fingerprint)
    if cache.key_codes or (cache.fingerprint and cache.informed):
        return _kept(cache, codec, place)
    return codec.with_spec(own.spec) if cache.fingerprint else codec


def check_placed(cache: "CompressedKVCache") -> None:
    """Raise ValueError if nobody knows yet how the keys of ``cache`` turn."""
    if cache.unplaced_bias is not None:
        raise ValueError(
            "this cache was saved or pickled and leaves out a bias of the keys, turned as "
            "its model does: run that model, TURBOQUANT=1, before reading it"
        )


def _kept(
    cache: "CompressedKVCache", codec: KVCodec, place: Callable[[mx.array], KeyBias]
) -> KVCodec:
    """The codec that made the codes: ``codec`` if that makes the same."""
    own = cache.codec
    if codec is own or codec.makes_the_codes_of(own, cache.bias):
        return codec
    bias = own.bias if cache.unplaced_bias is None else place(cache.unplaced_bias)
    return KVCodec(own.spec, own.balance, bias, own.layout, own.query_squares)

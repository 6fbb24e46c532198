"""Saving a compressed cache and getting it back, checked before it is trusted."""

import functools
import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec
from ..codecs.segmented import FIRST_BITS
from ..per_thread import release
from ..rules import CODEC_BITS
from .full_precision import FullPrecisionTokens
from .visibility import BLOCK, Ring, Visibility

if TYPE_CHECKING:
    from .compressed import CompressedKVCache

FORMAT = "turboquant-kv/2"
# The same without the layout of the channels and the key bias; read if none was left out.
OLD_FORMAT, OLD_PARTS = "turboquant-kv/1", 9
# The mean squares of queries are not in all files of this version: they only say how to round.
PARTS = OLD_PARTS + 2, OLD_PARTS + 3
REMEDY = "make the prompt cache again with this version and model"


def to_state(cache: "CompressedKVCache") -> tuple:
    """What mlx-lm saves and evaluates: strings, the offset and arrays.

    (format, description, fingerprint, offset, keys, values, key codes, value codes,
    balance, layout, bias, query squares); the description is JSON: the codec, the window, the
    sinks, a checksum of the rotations, the first position that has codes, and for rotating caches
    how many tokens they hold. The last four are None if no codes needed them so far.
    """
    codec = cache.codec
    known: tuple[mx.array | None, ...] = (None,) * 4
    if cache.informed:
        known = codec.balance, codec.layout, cache.bias, codec.query_squares
    return (
        FORMAT,
        _description(
            codec and codec.spec,
            codec and codec.checksum,
            cache.visibility,
            cache.first_quantized,
            cache.ring,
        ),
        str(cache.fingerprint),
        cache.offset,
        cache.full_tokens.keys,
        cache.full_tokens.values,
        cache.key_codes,
        cache.value_codes,
        *known,
    )


def restore(cache: "CompressedKVCache", state: Any) -> None:
    """Fill ``cache``, constructed or not, from what :func:`to_state` gave.

    Raises:
        ValueError: the state is of another format or version, or its parts do not
            fit together.
    """
    found = state[0] if isinstance(state, (list, tuple)) and state else None
    if found not in (FORMAT, OLD_FORMAT):
        shown = repr(found) if isinstance(found, str) else "unknown"
        raise ValueError(f"prompt cache: format {shown}, expected {FORMAT!r}: {REMEDY}")
    expected = (OLD_PARTS,) if found == OLD_FORMAT else PARTS
    if len(state) not in expected:
        raise ValueError(f"prompt cache: {len(state)} parts, expected {expected[-1]}: {REMEDY}")
    _, description, fingerprint, offset, keys, values, key_codes, value_codes, *known = state
    balance, layout, bias, query_squares = (*known, None, None, None)[:4]
    try:
        parts = json.loads(description)
        type(cache).__init__(cache, **parts["ring"])
        cache.fingerprint = fingerprint
        if parts["codec"] is None:
            return
        visibility, first_quantized = Visibility(**parts["visibility"]), int(parts["first_coded"])
        _check_visibility(visibility)
        spec = CodecSpec(**parts["codec"])
        _check_spec(spec)
        codec = KVCodec(spec, balance, None, layout, query_squares)
        left_out, same_rotation = parts.get("biased", False), parts["rotation"] == codec.checksum
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"prompt cache: unreadable description ({error!r}): {REMEDY}") from error
    _require(same_rotation, "its rotation is not the one that this version makes")
    _require(not (left_out and key_codes), "an older version left its model's key bias out of it")
    cache.codec, cache.visibility, cache.unplaced_bias = codec, visibility, bias
    if keys is None:
        return
    key_codes, value_codes = tuple(key_codes or ()), tuple(value_codes or ())
    quantized = first_quantized + (key_codes[0].shape[-1] if key_codes else 0)
    tokens = FullPrecisionTokens(keys, values)
    cache.hold(tokens, key_codes, value_codes, first_quantized, quantized, offset)
    _check_arrays(cache)
    known = (x for x in (balance, layout, bias, query_squares) if x is not None)
    release((*cache.arrays, *known))


def check_fits(cache: "CompressedKVCache", codec: KVCodec, fingerprint: Any) -> None:
    """Raise ValueError unless a filled cache can serve the layer of ``codec``."""
    ours, theirs = cache.codec.spec, codec.spec
    if ours.dims != theirs.dims:
        raise ValueError(
            f"prompt cache: made for head dim {ours.head_dim}, the model has "
            f"{theirs.head_dim}: {REMEDY}"
        )
    filled_by, other = str(cache.fingerprint), str(fingerprint)
    if filled_by and other and filled_by != other:
        raise ValueError(
            f"prompt cache: made by another model or layer (fingerprint "
            f"{filled_by}, this one is {other}): {REMEDY}"
        )


# mlx-lm asks for the state of every layer after every chunk of a prompt.
@functools.lru_cache(maxsize=64)
def _description(
    spec: CodecSpec | None,
    checksum: int | None,
    visibility: Visibility,
    first_quantized: int,
    ring: Ring | None,
) -> str:
    parts = {
        "codec": spec and spec._asdict(),
        "visibility": {"window": visibility.window, "sinks": visibility.sinks},
        "rotation": checksum,
        "first_coded": first_quantized,
        "ring": {"max_size": ring.max_size, "keep": ring.keep} if ring else {},
    }
    return json.dumps(parts, sort_keys=True)


def _check_arrays(cache: "CompressedKVCache") -> None:
    keys, values = cache.full_tokens.keys, cache.full_tokens.values
    spec = cache.codec.spec
    _require(
        isinstance(cache.offset, int)
        and all(isinstance(x, mx.array) and x.ndim == 4 for x in (keys, values))
        and keys.shape[:3] == values.shape[:3]
        and all(mx.issubdtype(x.dtype, mx.floating) for x in (keys, values))
        and (keys.shape[3], values.shape[3]) == (spec.head_dim, spec.value_dim),
        "keys and values do not have the shapes of its description",
    )
    batch, heads, full, _ = keys.shape
    missing = cache.offset - full
    forgotten = cache.ring.oldest(cache.offset - 1, 0)[1] if cache.ring else 0
    _require(
        0 <= missing <= max(0, max(cache.quantized, forgotten) - cache.visibility.sinks)
        and 0 <= cache.first_quantized <= cache.quantized <= cache.offset
        and (cache.ring is not None or cache.first_quantized == 0),
        f"{full} full-precision and {cache.quantized} quantized tokens do not make {cache.offset}",
    )
    # One encoded token shows what every array must look like.
    codec = KVCodec(spec)
    key_model = codec.encode_keys(mx.zeros((1, heads, 1, spec.head_dim)), 0)
    value_model = codec.encode_values(mx.zeros((1, heads, 1, spec.value_dim)))
    for codes, model, axis in (
        (cache.key_codes, key_model, 3),
        (cache.value_codes, value_model, 2),
    ):
        count = cache.quantized - cache.first_quantized
        fits = len(codes) == (len(model) if count else 0)
        for array, expected in zip(codes, model):
            shape = list(expected.shape)
            shape[0], shape[axis] = batch, count
            fits = fits and list(array.shape) == shape and array.dtype == expected.dtype
        _require(fits, "its codes do not have the shapes of its description")
    dim = spec.head_dim
    for name, x, wanted in (
        ("key balance", cache.codec.balance, (heads, 1, dim)),
        ("key layout", cache.codec.layout, (heads, dim + 1)),
        ("key bias", cache.bias, (heads, dim)),
        ("table of query squares", cache.codec.query_squares, (heads, dim)),
    ):
        _require(
            x is None or x.shape == wanted,
            f"its {name} does not have the shape of its description",
        )
    positive = {
        "key balance": cache.codec.balance,
        "table of query squares": cache.codec.query_squares,
    }
    for name, x in (*positive.items(), ("key bias", cache.bias)):
        _require(
            x is None or (mx.issubdtype(x.dtype, mx.floating) and bool(mx.isfinite(x).all())),
            f"its {name} is not made of numbers",
        )
    for name, x in positive.items():
        _require(x is None or bool((x > 0).all()), f"its {name} is not positive")
    _require(
        cache.codec.layout is None or _is_layout(cache.codec.layout, spec),
        "its key layout is no order of the channels and bits of their first segment",
    )


def _check_visibility(visibility: Visibility) -> None:
    """Raise ValueError unless it is one of whole blocks."""
    window, sinks = visibility.window, visibility.sinks
    whole = all(type(x) is int and x >= 0 for x in (window, sinks))
    if not whole or window % BLOCK:
        raise ValueError(f"window {window!r}, sinks {sinks!r}")


def _check_spec(spec: CodecSpec) -> None:
    """Raise ValueError if there are no such codecs."""
    for codec, bits in (spec.key_codec, spec.key_bits), (spec.value_codec, spec.value_bits):
        allowed = {**CODEC_BITS, SEGMENTED: (4,)}.get(codec, (bits,) if codec == "exact" else ())
        if bits not in allowed:
            raise ValueError(f"{bits!r} bits of codec {codec!r}")


def _is_layout(layout: mx.array, spec: CodecSpec) -> bool:
    if layout.dtype != mx.int32 or spec.segments == 1:
        return False
    order, first_bits = np.split(np.array(layout), [-1], axis=-1)
    channels = np.arange(spec.head_dim)
    return bool((np.sort(order) == channels).all() and np.isin(first_bits, FIRST_BITS).all())


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(f"prompt cache: {problem}: {REMEDY}")

"""Patching the attention of a family of models, so that it reads compressed caches."""

import functools
import itertools
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from .. import patching
from ..attention.dispatch import attend
from ..attention.masks import check
from ..cache import BatchCompressedKVCache, CompressedKVCache
from ..cache.causal import is_causal
from ..cache.parts import parts
from ..cache.transaction import AllOrNothing
from . import upstream
from .family import Family, family_of, register
from .layer import known_layer
from .whole_passes import guard


def patch_family(module: ModuleType, family: Family) -> None:
    """Let the models of ``module`` attend over compressed caches.

    Replaces the module's name ``scaled_dot_product_attention``, and wraps the
    attention class's ``__call__`` so that a cache learns which layer it serves, and the
    model's, see :mod:`whole_passes`; nothing at all where mlx-lm asks for it (see :mod:`upstream`).

    Raises:
        AttributeError: the module does not have what the family describes.
    """
    attention = getattr(module, family.attention)
    if not upstream.available():
        places = patching.places_of(attention.__call__)
        if "cache" not in places:
            raise AttributeError(
                f"{attention.__qualname__}.__call__ has no parameter cache, only "
                f"{', '.join(places)}: name the class that updates the cache"
            )
        if hasattr(module, "scaled_dot_product_attention") or not family.reads_arrays:
            patching.wrap(module, "scaled_dot_product_attention", _scaled_dot_product_attention)
        patching.wrap(attention, "__call__", functools.partial(_attention_call, places))
        if hasattr(module, "Model"):
            # Others are met when a prompt cache is made for them.
            guard(module.Model)
    register(attention, module.__name__, family)


def _scaled_dot_product_attention(wrapped, instance, args, kwargs):
    return attend(wrapped, *args, **kwargs)


def _attention_call(places, wrapped, instance, args, kwargs):
    # Each layer of each step comes here, and a step of decoding can wait for the host.
    cache = patching.argument("cache", places, args, kwargs)
    if type(cache) is CacheList:
        cache = next(filter(_ours, parts(cache)), None)
    if not _ours(cache):
        return wrapped(*args, **kwargs)
    family = family_of(instance)
    if family.follows is not None and family.follows(instance):
        with AllOrNothing(cache):
            cache.follow()
            out = wrapped(*args, **kwargs)
            cache.end()
        return out
    if cache.attention is None or cache.attention() is not instance:
        bind(cache, instance)
    ends: Sequence[int] = ()
    mask = patching.argument("mask", places, args, kwargs)
    if mask is not None:
        given, hidden = {**dict(zip(places, args)), **kwargs}, next(iter(places))
        batch, count = given[hidden].shape[:2]
        if not isinstance(mask, str) or mask != "causal":
            # Before the cache changes.
            heads, _ = family.head_counts(instance)
            check(mask, (batch, heads, count, cache.columns(count)))
        if family.reads_arrays and is_causal(mask):
            ends = [0, *(cache.cuts(count) if count > 1 else ()), count]
    with AllOrNothing(*cache.holders):
        cache.attending = True
        try:
            if len(ends) > 2:
                out = _in_parts(wrapped, hidden, given, cache, ends)
            else:
                out = wrapped(*args, **kwargs)
        except ValueError:
            if not cache.whole:
                # Perhaps MLX's words for a mask of all tokens over those that were given.
                cache.settle()
            raise
        if cache.whole or not cache.read:
            cache.settle(out)
        cache.end()
    return out


def _in_parts(
    attention: Any, hidden: str, given: dict[str, Any], cache: Any, ends: Sequence[int]
) -> mx.array:
    """The output of a causal attention that reads arrays: it is given those queries together
    that see the same.

    Args:
        hidden: the name of the hidden states among the arguments ``given``.
        ends: where parts of the queries begin and end, each of which sees the same.
    """
    outs = []
    for first, last in itertools.pairwise(ends):
        own, tokens = slice(first, last), cache.columns(last - first)
        part = {**given, hidden: given[hidden][:, own]}
        for name, x in given.items():
            if isinstance(x, mx.array) and name != hidden and ends[-1] in x.shape[-2:-1]:
                # A mask, or a factor of each query.
                part[name] = x[..., own, :tokens] if name == "mask" else x[..., own, :]
        mask = part.get("mask")
        if isinstance(mask, str):
            part["mask"] = mask if last - first > 1 else None
        elif mask is not None:
            # Attentions to one query may count on what mlx-lm's masks of batches look like.
            part["mask"] = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        outs.append(attention(**part))
    return mx.concatenate(outs, axis=1)


def _ours(cache: Any) -> bool:
    return isinstance(cache, (CompressedKVCache, BatchCompressedKVCache))


def bind(cache: CompressedKVCache | BatchCompressedKVCache, attention: nn.Module) -> None:
    """Tell a cache which layer it serves.

    Raises:
        ValueError: it was filled by another model.
    """
    layer = known_layer(attention)
    invariant = bool(layer.visibility.invariant)
    cache.bind(layer.codec, layer.fingerprint, layer.kernel, invariant, layer.key_bias)
    cache.attention, cache.reading = weakref.ref(attention), layer.reading

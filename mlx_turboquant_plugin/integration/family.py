"""What distinguishes one architecture from another, and which ones are supported."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .projections import Projection, base_linear, fused_projections


def _layers(model: Any) -> list[Any]:
    return getattr(model, "layers", None) or []


@dataclass(frozen=True)
class Family:
    """One architecture: the names of what the cache must know about.

    A family is right if keys and values reach the cache at the positions where the
    queries expect them, and its attention calls ``scaled_dot_product_attention`` with
    that cache, query heads h n, ..., h n + n - 1 sharing KV head h.

    Attributes:
        attention: the attention class in the model's module.
        layer_attention, layer_norm: the attention and the norm before it in a layer,
            dotted where they are deeper; ``layer_norm`` is None where there is none
            with the weights of the projections' input.
        heads, kv_heads: the numbers of heads in an attention, names or a number.
        projections: the linear layers of queries, keys and values in an attention, or
            the one that makes all three.
        grouped: how such a fused one is laid out, see :func:`fused_projections`.
        head_norms: the norms of queries and keys in an attention; it may lack them.
        rope: the rope object in an attention, which may lack it; empty if its keys have no
            rotary positions.
        dims: names of the head dims of keys and values in an attention, where
            ``projections`` do not make keys and values as they are.
        casts_keys: whether the attention casts the keys that the cache returns. It may do
            nothing else to keys and values before it hands them to the function above, or it
            is taken for one that computes scores itself.
        reads_arrays: whether the attention is such a one: it computes with all keys and values.
            Its masks should be causal: with others all queries of a pass read the tokens exactly
            that its newest does.
        shared: ``f(attention)`` says whether other layers compute with the keys and values that
            this one is given.
        follows: ``f(attention)`` says whether it reads the cache that another layer has just
            updated, by ``keys_and_values``, and has none of its own; None where no layer does.
        latent: whether its keys are latents, vectors that all heads share and make both keys and
            values of, and its values what is left of keys, their part with rotary positions (MLA).
        obstacle: ``f(attention)`` says why the keys of a layer can't be compressed,
            or returns None.
        cached_layers: ``f(model)`` gives the layer of each cache, where this is not
            ``model.layers``.
    """

    attention: str = "Attention"
    layer_attention: str = "self_attn"
    layer_norm: str | None = "input_layernorm"
    heads: str = "n_heads"
    kv_heads: str | int = "n_kv_heads"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    grouped: bool = False
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    rope: str = "rope"
    dims: tuple[str, str] | None = None
    casts_keys: bool = False
    reads_arrays: bool = False
    latent: bool = False
    shared: Callable[[nn.Module], bool] = lambda attention: False
    follows: Callable[[nn.Module], bool] | None = None
    obstacle: Callable[[nn.Module], str | None] = lambda attention: None
    cached_layers: Callable[[Any], list[Any]] = _layers

    def norm_of(self, layer: Any) -> nn.Module | None:
        """The norm before the attention of a layer, or None."""
        return _deep(layer, self.layer_norm) if self.layer_norm else None

    def head_counts(self, attention: nn.Module) -> tuple[int, int]:
        """The numbers of query heads and of KV heads."""
        kv_heads = self.kv_heads
        return (
            getattr(attention, self.heads),
            kv_heads if isinstance(kv_heads, int) else getattr(attention, kv_heads),
        )

    def projections_of(self, attention: nn.Module) -> tuple[Projection, ...]:
        """The projections of queries, keys and values, as far as there are any.

        Raises:
            ValueError: the layer has no keys of its own, or something else than linear layers.
        """
        missing = [name for name in self.projections[:2] if name not in attention]
        if missing:
            raise ValueError(f"a layer without {missing[0]} shares the keys of another")
        linears = []
        for name in self.projections:
            if name not in attention:
                continue
            linear = base_linear(attention[name])
            if not isinstance(getattr(linear, "weight", None), mx.array):
                kind = type(attention[name]).__name__
                raise ValueError(f"its {name} is a {kind}, not a linear layer with a weight")
            linears.append(linear)
        if len(self.projections) > 1 or self.dims:
            return tuple(map(Projection, linears))
        return fused_projections(linears[0], *self.head_counts(attention), self.grouped)


_families: dict[type, Family] = {}
# By module, for those that say where the layers of a model are.
_modules: dict[str, Family] = {}


def register(attention: type, module: str, family: Family) -> None:
    """Support the attention class and the models of the module with this name."""
    _families[attention] = family
    _modules[module] = family


def family_of(attention: Any) -> Family:
    """The family of an attention module whose class is registered; else a KeyError."""
    return _families[type(attention)]


def layers_of(model: Any) -> list[Any]:
    """The layer of each of the model's caches; may be of another number than these."""
    family = _modules.get(type(model).__module__)
    if family is None:
        # It may attend through the module of another.
        known = (attention_of(layer)[1] for layer in _layers(model))
        family = next(filter(None, known), Family())
    return list(family.cached_layers(model) or [])


def attention_of(layer: Any, place: int = 0) -> tuple[Any, Family | None]:
    """The attention of a layer and its family; (None, None) if none is supported.

    Args:
        place: which one, in a layer that has several.
    """
    # In the order of registration: a set has another order in each process.
    for path in dict.fromkeys(family.layer_attention for family in _families.values()):
        found = _deep(layer, path)
        several = found if isinstance(found, list) else [found]
        attention = several[place] if place < len(several) else None
        family = _families.get(type(attention))
        if family is not None and family.layer_attention == path:
            return attention, family
    return None, None


def placed(cache: Any) -> Iterator[tuple[Any, int]]:
    """The caches of a layer and the places of the attentions that they are for.

    Further ones are for something else, such as an indexer.
    """
    # mlx-lm is half imported when this module is, see hook.py.
    from ..cache.parts import parts

    place = 0
    for one in parts(cache):
        yield one, place
        place += hasattr(one, "update_and_fetch")


def _deep(owner: Any, path: str) -> Any:
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return None

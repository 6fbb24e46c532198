"""What the keys and queries of a model are like, from one pass over a few tokens.

The mean of a head's keys before RoPE is most of their energy, and how much a channel's error
matters differs widely. Weights alone don't tell; a few random tokens tell it nearly as well as
text does, and need no tokenizer (docs/quality.md).
"""

import copy
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.utils import get_total_parameters

from .. import patching
from ..cache.observed import ObservedKVCache
from ..cache.parts import rebuilt
from ..codecs.key_bias import KeyBias, RotaryTable
from ..log import logger
from . import calibration_file
from .calibration_file import Statistics
from .family import attention_of, family_of, layers_of, placed
from .projections import contents

# As many as tell all they can: with half of them the text's loss is 5% larger.
TOKENS = 512
# A CPU reads so slowly that fewer must do: so many weights times tokens are ten seconds of two
# cores.
CPU_WORK = 2e10
FEWEST = 16
# First tokens are unlike the others, and stay in full precision.
SKIPPED = 4
SEED = 2504

# By the identity of an attention module: what it was measured with, and how it can be.
_measured: dict[int, tuple[weakref.ref, tuple[Any, ...], Statistics | None]] = {}
_expected: dict[int, tuple[weakref.ref, "Calibration"]] = {}

# One thread measures, and the others wait for what it finds.
_lock = threading.RLock()


class Calibration:
    """How to measure a model, once one of its layers needs to know.

    Args:
        model: not held.
        caches: mlx-lm's own caches for it, empty.
    """

    def __init__(self, model: nn.Module, caches: Sequence[Any]):
        self._model = weakref.ref(model)
        # The originals may be filled before the measuring.
        self._caches = [rebuilt(cache, _observed) for cache in caches]
        attentions = [one for one, _ in _served(layers_of(model), caches) if one is not None]
        self._attentions = [weakref.ref(one) for one in attentions]
        for one in attentions:
            _keep(_expected, one, self)

    def statistics(self, attention: nn.Module) -> tuple[bool, Statistics | None]:
        """Those of one of the model's attentions, see :func:`statistics_for`."""
        with _lock:
            known, model = _known(attention), self._model()
            # Queries are observed by what switching compression off has put back.
            if not known[0] and model is not None and patching.active():
                statistics_of(model, layers_of(model), self._caches)
                known = _known(attention)
            return known

    @property
    def failed(self) -> bool:
        """Whether it was tried in vain; False if the model is gone."""
        attentions = [one for one in (reference() for reference in self._attentions) if one]
        known = map(_known, attentions)
        return bool(attentions) and all(found and one is None for found, one in known)


def statistics_for(attention: nn.Module) -> tuple[bool, Statistics | None]:
    """Whether an attention has been measured, maybe just now, and what was found."""
    found = _expected.get(id(attention))
    if found is None or found[0]() is not attention:
        return False, None
    return found[1].statistics(attention)


def statistics_of(
    model: nn.Module, layers: Sequence[Any], caches: Sequence[Any]
) -> list[Statistics | None]:
    """Statistics of each cache of keys that has a supported attention, None for the others.

    Measured once for a model, or read from the user's cache folder. If the model can't be run
    by itself there are none.

    Args:
        layers, caches: the layers, and mlx-lm's own caches for them, empty.
    """
    attentions = [attention for attention, _ in _served(layers, caches)]
    known = [_known(attention) for attention in attentions]
    if not any(attentions) or all(found for found, _ in known):
        return [statistics for _, statistics in known]
    try:
        found = _loaded_or_measured(model, attentions, layers, caches)
    except Exception as error:  # Whatever a model does when it is run in an unusual way.
        logger.info("not calibrated: %s: %s", type(error).__name__, error)
        found = [None] * len(attentions)
    for attention, statistics in zip(attentions, found, strict=True):
        if attention is not None:
            _keep(_measured, attention, tuple(contents(attention)), statistics)
    return found


def assume(attention: nn.Module, statistics: Statistics) -> None:
    """Take ``statistics`` for those of an attention, which is not measured then."""
    _keep(_measured, attention, tuple(contents(attention)), statistics)


def _served(layers: Sequence[Any], caches: Sequence[Any]) -> list[tuple[nn.Module | None, Any]]:
    """The attention of each cache of keys, None where it is not supported, and the cache."""
    return [
        (attention_of(layer, place)[0], one)
        for layer, cache in zip(layers, caches)
        for one, place in placed(cache)
        if hasattr(one, "update_and_fetch")
    ]


def _keep(table: dict[int, tuple], attention: nn.Module, *values: Any) -> None:
    """Note ``values`` for as long as there is the attention."""
    key = id(attention)
    table[key] = weakref.ref(attention, lambda _: table.pop(key, None)), *values


def _loaded_or_measured(
    model: nn.Module, attentions: Sequence[Any], layers: Sequence[Any], caches: Sequence[Any]
) -> list[Statistics | None]:
    tokens = _tokens(model)
    if distributed():
        return _measure(model, layers, caches, tokens)
    fingerprint = calibration_file.fingerprint(model, attentions, tokens)
    found = calibration_file.load(fingerprint, len(attentions))
    if found is None:
        found = _measure(model, layers, caches, tokens)
        if any(found):
            calibration_file.save(fingerprint, found)
    return found


def _known(attention: nn.Module | None) -> tuple[bool, Statistics | None]:
    """Whether an attention has been measured with the weights that it has, and what was found."""
    if attention is None:
        return True, None
    reference, weights, statistics = _measured.get(id(attention), (None, (), None))
    known = reference is not None and reference() is attention
    return known and same_objects(tuple(contents(attention)), weights), statistics


def same_objects(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether both hold the very same objects."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others))


def distributed() -> bool:
    """Whether other processes run parts of the model: then all must do the same."""
    return not {"MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}.isdisjoint(os.environ)


def _measure(
    model: nn.Module, layers: Sequence[Any], caches: Sequence[Any], tokens: mx.array
) -> list[Statistics | None]:
    """The statistics of each cache of keys."""
    observed = [rebuilt(cache, _observed) for cache in caches]
    modes = [(module, module.training) for _, module in model.named_modules()]
    model.eval()  # Without dropout, which would take random numbers from others.
    try:
        model(tokens, cache=observed)
    finally:
        # Parents come first, and take their children with them.
        for module, training in modes:
            module.train(training)
    # Held until all layers are done, since they share the rotary table.
    biases: list[KeyBias] = []
    found = [
        None if attention is None else _summary(attention, biases, *_seen(cache))
        for attention, cache in _served(layers, observed)
    ]
    # The logits are not asked for, so they are never made.
    mx.eval([x for statistics in found if statistics for x in statistics if x is not None])
    return [one if one and one.usable() else None for one in found]


def _tokens(model: nn.Module) -> mx.array:
    """Random tokens, int32 (1, T)."""
    sizes = [
        module.weight.shape[0]
        for _, module in model.named_modules()
        if isinstance(module, calibration_file.EMBEDDINGS)
    ]
    if not sizes:
        raise ValueError("it has no embedding of tokens")
    # Positions may be embedded, too: what is too large would be read from anywhere.
    args = getattr(model, "args", None)
    size = min(getattr(args, "vocab_size", None) or min(sizes), max(sizes))
    count = min(_count(model), getattr(args, "n_positions", None) or TOKENS)
    chosen = np.random.default_rng(SEED).integers(0, size, count)
    return mx.array(chosen.astype(np.int32))[None]


def _count(model: nn.Module) -> int:
    # All parts of a model must do the same, whatever share of the weights they have.
    if mx.default_device().type == mx.gpu or distributed():
        return TOKENS
    return min(TOKENS, max(FEWEST, int(CPU_WORK / get_total_parameters(model))))


def _observed(cache: Any) -> Any:
    return ObservedKVCache() if type(cache) in (KVCache, RotatingKVCache) else copy.deepcopy(cache)


def _seen(cache: Any) -> tuple[mx.array | None, mx.array | None]:
    return cache.seen if isinstance(cache, ObservedKVCache) else (None, None)


def _summary(
    attention: nn.Module,
    biases: list[KeyBias],
    keys: mx.array | None,
    queries: mx.array | None,
) -> Statistics | None:
    """The statistics of keys (1, H, T, D) and queries (1, H_q, T, D) as attention got them.

    A mean that can be taken away from keys joins ``biases``.
    """
    if keys is None or queries is None:
        return None
    keys, queries = (x.astype(mx.float32) for x in (keys, queries))
    try:
        rope = _rope_of(attention)
        turned_back = RotaryTable(rope, keys.shape[-1]).turned_back(keys)[0, :, SKIPPED:]
        mean, square = mx.mean(turned_back, axis=1), mx.var(turned_back, axis=1)
        biases.append(KeyBias(mean, rope))
    except (TypeError, ValueError):
        # Its angles depend on more than the position: no mean is the same for all positions.
        mean, square = None, mx.mean(keys[0, :, SKIPPED:] ** 2, axis=1)
    if family_of(attention).latent:
        return Statistics(mean, square, _latent_square(attention, queries))
    return Statistics(mean, square, mx.mean(queries[0, :, SKIPPED:] ** 2, axis=1))


def _latent_square(attention: nn.Module, queries: mx.array) -> mx.array:
    """How much the channels of a latent count, fp32 (H_q, D), in scores and in values.

    Scores and values have the same weight: each share is scaled to a mean of 1.

    Args:
        queries: (1, H_q, T, D'), as the keys that are made of latents are read with.
    """
    parts: list[Any] = [
        # As queries are multiplied with latents in decoding.
        attention.embed_q(queries[0, :, SKIPPED:, : attention.qk_nope_head_dim]),
        # What becomes of each channel alone, (1, H_q, D, D_v).
        attention.unembed_out(mx.eye(attention.kv_lora_rank, dtype=queries.dtype)[None, None]),
    ]
    scores, values = (x.astype(mx.float32) ** 2 for x in parts)
    in_scores, in_values = mx.mean(scores, axis=1), mx.mean(values, axis=(0, 1, 3))
    return in_scores / mx.mean(in_scores) + in_values / mx.mean(in_values)


def _rope_of(attention: nn.Module) -> Any:
    family = family_of(attention)
    if family.dims:
        raise ValueError("its keys are put together of parts")
    return getattr(attention, family.rope, None)

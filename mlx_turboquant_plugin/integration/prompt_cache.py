"""Give each model that mlx-lm makes a prompt cache for a compressed one."""

from typing import Any

from mlx_lm.models import cache as cache_module
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from .. import compiling, patching, settings
from ..attention.dispatch import attend
from ..cache import BatchCompressedKVCache, CompressedKVCache, RotatingCompressedKVCache
from ..cache.files import check_file
from ..cache.observed import ObservedKVCache
from ..cache.parts import only_compressed, rebuilt
from ..log import log_once, logger
from . import table, upstream
from .attention import bind
from .calibration import Calibration, distributed
from .family import attention_of, layers_of, placed
from .identity import identity_of
from .layer import known_layer
from .server import announce, serving
from .whole_passes import guard_all

KINDS = (CompressedKVCache, RotatingCompressedKVCache, BatchCompressedKVCache)
BY_WEIGHTS = "; keys go by the weights alone, since it could not be measured"
# Kinds of mlx-lm's that this package would have replaced.
UNCOMPRESSED = {"KVCache", "QuantizedKVCache", "RotatingKVCache"}

NOT_INVARIANT = (
    "its keys are read as arrays, which does not go with TURBOQUANT_INVARIANT=1: unset that"
)

# What became of each model's caches, and the calibration of those that are compressed.
_reports: dict[settings.ModelIdentity, tuple[str, Calibration | None]] = {}


def register() -> None:
    """Have an mlx-lm with hooks (see patches/) use compressed caches."""
    upstream.register(_prepare, attend, (*KINDS, ObservedKVCache))


def check_saved(file: str) -> None:
    """Check a file before mlx-lm loads a prompt cache from it; say if it is uncompressed.

    Raises:
        ValueError: see :func:`check_file`.
    """
    for kind in KINDS:
        # mlx-lm looks the class up by its name there.
        setattr(cache_module, kind.__name__, kind)
    if {*check_file(file)} <= UNCOMPRESSED:
        log_once(
            "the prompt cache %s was saved uncompressed and stays so: make it again with "
            "TURBOQUANT=1",
            file,
        )


def inform(caches: list[Any]) -> None:
    """Have caches learn what their codes will need: whoever loads them may not have the model.

    Not where other processes run parts of the model, which may save nothing now.
    """
    if distributed():
        return
    for one in only_compressed(caches):
        if one.codec and not one.empty():
            one.codec.learn()


def refuse_kv_bits(caches: list[Any], bits: int) -> None:
    """Say, once, that mlx-lm's own quantization is left out where ``caches`` are compressed."""
    for one in only_compressed(caches)[:1]:
        one.to_quantized(bits=bits)


def report() -> list[str]:
    """One line about each model that a cache was made for: compressed how, or why not."""
    return [
        text + BY_WEIGHTS if calibration is not None and calibration.failed else text
        for text, calibration in _reports.values()
    ]


def compress(model: Any, caches: list[Any]) -> list[Any]:
    """Replace the KVCaches of ``caches`` by compressed ones where the model allows it.

    No weight is evaluated, and the model is not run.
    """
    identity = identity_of(model)
    try:
        return _compress(model, identity, caches)
    except Exception as error:  # Models can be changed in any way, and have to run.
        logger.debug("the failure in full", exc_info=True)
        return _leave(identity, caches, f"{type(error).__name__}: {error}")


def _compress(model: Any, identity: settings.ModelIdentity, caches: list[Any]) -> list[Any]:
    chosen = settings.in_force().for_model(identity)
    pattern = chosen.opted_out(identity)
    if pattern is not None:
        return _leave(identity, caches, f"opt_out pattern {pattern!r} matches it")
    reason = table.why_not(type(model).__module__)
    if reason:
        return _leave(identity, caches, reason)
    layers = layers_of(model)
    if len(layers) != len(caches):
        return _leave(identity, caches, "its layers and its caches do not correspond")
    try:
        by_layer = chosen.for_layers(len(layers))
    except settings.SettingsError as error:
        return _leave(identity, caches, str(error))
    compiling.update()
    calibration = None if chosen.bypass == "identity" else Calibration(model, caches)
    pairs = [_compressed(identity.type, *each) for each in zip(layers, caches, by_layer)]
    pairs = _all_or_no_rings(caches, pairs)
    compressed = [new or old for (new, _), old in zip(pairs, caches)]
    reasons = [reason for _, reason in pairs if reason]
    count = len(layers) - len(reasons)
    why = "; ".join(dict.fromkeys(reasons))
    if count == 0:
        return _leave(identity, caches, why or "it has no layers")
    text = f"{_name(identity)}: {count} of {len(layers)} layers compressed, "
    text += _bits(chosen, compressed)
    if not upstream.available():
        guard_all(model)
    if why:
        text += f"; the others not: {why}"
    if identity not in _reports:
        logger.info("%s", text)
        if serving():
            kernel = only_compressed(compressed)[0].kernel
            announce(model, _name(identity), chosen, kernel, caches, compressed)
    _report(identity, text, calibration)
    return compressed


def _all_or_no_rings(caches: list[Any], pairs: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Rotating caches of a size share one mask, and compressed batches have another layout."""
    reasons: dict[int, str] = {}
    for cache, (_, why) in zip(caches, pairs):
        if type(cache) is RotatingKVCache and why:
            reasons.setdefault(cache.max_size, why)
    return [
        (None, why or reasons[cache.max_size])
        if type(cache) is RotatingKVCache and cache.max_size in reasons
        else (new, why)
        for cache, (new, why) in zip(caches, pairs)
    ]


def _prepare(model: Any, caches: list[Any], new: bool) -> list[Any]:
    """What an mlx-lm with hooks calls for every prompt cache, made by it or handed to it."""
    if not patching.active():
        return caches
    if new:
        caches = compress(model, caches)
    for layer, cache in zip(layers_of(model), caches):
        for one, place in placed(cache):
            attention, _ = attention_of(layer, place)
            if isinstance(one, CompressedKVCache) and attention is not None:
                bind(one, attention)
    return caches


def _compressed(
    model: str, layer: Any, cache: Any, chosen: settings.Settings, place: int = 0
) -> tuple[Any, str]:
    """A compressed cache for one layer of a model of this type, or None and the reason.

    Args:
        place: of the attention in the layer.
    """
    if type(cache) is CacheList:
        return _compressed_in_list(model, layer, cache, chosen)
    if type(cache) not in (KVCache, RotatingKVCache):
        return None, f"{type(cache).__name__} is not supported"
    attention, family = attention_of(layer, place)
    if family is None:
        return None, "this architecture is not supported"
    if chosen.invariant and (
        family.shared(attention)
        or (family.reads_arrays and (type(cache) is RotatingKVCache or upstream.available()))
    ):
        return None, NOT_INVARIANT
    if family.follows is not None and upstream.available():
        return None, "layers follow it, and mlx-lm's hooks don't say when"
    if type(cache) is RotatingKVCache and cache.keep >= cache.max_size:
        return None, f"its cache keeps the first {cache.keep} of {cache.max_size} tokens for ever"
    if getattr(layer, "use_sliding", False) and (type(cache) is KVCache or cache.keep):
        # Pixtral and Mistral 3: the mask alone says how far back queries see. Only a ring of
        # max_kv_size, not of the window, keeps first tokens.
        return None, "a sliding window over a cache that does not rotate with it is not supported"
    try:
        known = known_layer(attention, family.norm_of(layer), chosen)
    except ValueError as error:
        return None, str(error)
    known.reading.model = model
    parts = known.codec, known.visibility, known.kernel
    if type(cache) is KVCache:
        return CompressedKVCache(*parts), ""
    if known.visibility.covers(cache.max_size - cache.keep):
        # mlx-lm's own takes no more memory, and less time.
        return None, f"all tokens of a cache of {cache.max_size} stay in full precision"
    return RotatingCompressedKVCache(cache.max_size, cache.keep, *parts), ""


def _compressed_in_list(
    model: str, layer: Any, caches: CacheList, chosen: settings.Settings
) -> tuple[CacheList | None, str]:
    """The same for a layer that has several caches: its keys and values among them."""
    pairs = [_compressed(model, layer, one, chosen, place) for one, place in placed(caches)]
    if not any(replacement for replacement, _ in pairs):
        return None, pairs[-1][1]
    replacements = (replacement for replacement, _ in pairs)
    return rebuilt(caches, lambda old: next(replacements) or old), ""


def _leave(identity: settings.ModelIdentity, caches: list[Any], reason: str) -> list[Any]:
    text = f"{_name(identity)} runs uncompressed: {reason}"
    _report(identity, text)
    log_once("%s", text)
    return caches


def _report(
    identity: settings.ModelIdentity, text: str, calibration: Calibration | None = None
) -> None:
    # The newest is the last.
    _reports.pop(identity, None)
    _reports[identity] = text, calibration


def _name(identity: settings.ModelIdentity) -> str:
    where = identity.hub_id or identity.path
    return f"{identity.type} ({where})" if where else identity.type


def _bits(chosen: settings.Settings, caches: list[Any]) -> str:
    if chosen.bypass:
        return f"bypass {chosen.bypass}"
    specs = [one.codec.spec for one in only_compressed(caches) if one.codec]
    codecs = {spec.key_codec for spec in specs}
    values = {(spec.value_bits, spec.value_codec) for spec in specs}
    bits, codec = values.pop() if len(values) == 1 else (chosen.value_bits, chosen.value_codec)
    prompts = "read what decoding reads" if chosen.invariant else "read their own chunk exactly"
    return (
        f"keys {chosen.key_bits} bits {' and '.join(sorted(codecs))}, "
        f"values {bits} bits {codec}, "
        f"window {chosen.window}, sinks {chosen.sinks}, prompts {prompts}"
    )

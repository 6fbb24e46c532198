"""Give each model that mlx-lm makes a prompt cache for a compressed one."""

from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple

from mlx_lm.models.cache import KVCache, RotatingKVCache

from .. import patching, settings
from ..cache import BatchCompressedKVCache, CompressedKVCache, RotatingCompressedKVCache
from ..cache.files import check_file
from ..log import log_once, logger
from .family import family_of, known_layer
from .identity import identity_of

_reports: Dict[settings.ModelIdentity, str] = {}


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.models.cache``."""
    # Saved caches are looked up by name there.
    for kind in (CompressedKVCache, RotatingCompressedKVCache, BatchCompressedKVCache):
        setattr(module, kind.__name__, kind)
    patching.wrap(module, "make_prompt_cache", _make_prompt_cache)
    patching.wrap(module, "load_prompt_cache", _load_prompt_cache)


def report() -> List[str]:
    """One line about each model that a cache was made for: compressed how, or why not."""
    return list(_reports.values())


def compress(model: Any, caches: List[Any]) -> List[Any]:
    """Replace the KVCaches of ``caches`` by compressed ones where the model allows it."""
    identity = identity_of(model)
    chosen = settings.in_force().for_model(identity)
    pattern = chosen.opted_out(identity)
    if pattern is not None:
        return _leave(identity, caches, f"opt_out pattern {pattern!r} matches it")
    layers = list(getattr(model, "layers", None) or [])
    if len(layers) != len(caches):
        return _leave(identity, caches, "its layers and its caches do not correspond")
    compressed, reasons = [], []
    for layer, cache in zip(layers, caches):
        replacement, reason = _compressed(layer, cache, chosen)
        compressed.append(replacement or cache)
        if reason:
            reasons.append(reason)
    count = len(layers) - len(reasons)
    if count == 0:
        return _leave(identity, caches, reasons[0] if reasons else "it has no layers")
    text = f"{_name(identity)}: {count} of {len(layers)} layers compressed, {_bits(chosen)}"
    if reasons:
        text += f"; the others not: {reasons[0]}"
    if identity not in _reports:
        logger.info("%s", text)
    _reports[identity] = text
    return compressed


def _make_prompt_cache(wrapped, instance, args, kwargs):
    caches = wrapped(*args, **kwargs)
    model = args[0] if args else kwargs["model"]
    return compress(model, caches)


def _load_prompt_cache(wrapped, instance, args, kwargs):
    check_file(args[0] if args else kwargs["file_name"])
    return wrapped(*args, **kwargs)


def _compressed(
    layer: Any, cache: Any, chosen: settings.Settings
) -> Tuple[Optional[CompressedKVCache], str]:
    """A compressed cache for one layer, or None and the reason."""
    if type(cache) not in (KVCache, RotatingKVCache):
        return None, f"{type(cache).__name__} is not supported"
    attention = getattr(layer, "self_attn", None)
    family = family_of(attention)
    if family is None:
        return None, "this architecture is not supported"
    try:
        known = known_layer(attention, getattr(layer, family.layer_norm, None), chosen)
    except ValueError as error:
        return None, str(error)
    parts = known.codec, known.visibility, known.kernel
    if type(cache) is KVCache:
        return CompressedKVCache(*parts), ""
    return RotatingCompressedKVCache(cache.max_size, cache.keep, *parts), ""


def _leave(identity: settings.ModelIdentity, caches: List[Any], reason: str) -> List[Any]:
    text = f"{_name(identity)} runs uncompressed: {reason}"
    _reports[identity] = text
    log_once("%s", text)
    return caches


def _name(identity: settings.ModelIdentity) -> str:
    where = identity.hub_id or identity.path
    return f"{identity.type} ({where})" if where else identity.type


def _bits(chosen: settings.Settings) -> str:
    if chosen.bypass:
        return f"bypass {chosen.bypass}"
    return (
        f"keys {chosen.key_bits} bits {chosen.key_codec}, "
        f"values {chosen.value_bits} bits {chosen.value_codec}, "
        f"window {chosen.window}, sinks {chosen.sinks}"
    )

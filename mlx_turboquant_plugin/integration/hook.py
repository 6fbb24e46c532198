"""The hooks of mlx-lm's modules.

mlx-lm may be imported by a module of this package that is half imported itself. So most of the
rest is imported when mlx-lm first makes or loads a prompt cache, fills one, or imports a model.
"""

from types import ModuleType

from .. import hooking, patching
from . import upstream
from .table import FAMILIES

# By name, as an entry point is: it is built upon this package.
SERVING = "mlx_turboquant_plugin.serving.hook"


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm``: add those of its modules, of all families in the table."""
    package = module.__name__
    hooking.add(f"{package}.models.cache", f"{__name__}:patch_cache")
    hooking.add(f"{package}.models.cache", f"{SERVING}:patch_cache")
    hooking.add(f"{package}.server", f"{SERVING}:patch")
    hooking.add(f"{package}.generate", f"{__name__}:patch_generate")
    hooking.add(f"{package}.utils", f"{__package__}.identity:patch")
    for name in FAMILIES:
        hooking.add(f"{package}.models.{name}", f"{__name__}:patch_model")


def patch_model(module: ModuleType) -> None:
    """Have the models of a module with a family attend over compressed caches."""
    from .attention import patch_family

    patch_family(module, FAMILIES[module.__name__.rpartition(".")[2]])


def patch_cache(module: ModuleType) -> None:
    """Have prompt caches made, saved and loaded by :mod:`prompt_cache`."""
    if upstream.available():
        from . import prompt_cache

        prompt_cache.register()
        return
    patching.wrap(module, "make_prompt_cache", _make_prompt_cache)
    patching.wrap(module, "load_prompt_cache", _load_prompt_cache)
    patching.wrap(module, "save_prompt_cache", _save_prompt_cache)
    for kind in (module.BatchKVCache, module.BatchRotatingKVCache):
        patching.wrap(kind, "merge", _merge)
        patching.wrap(kind, "extend", _extend)


def patch_generate(module: ModuleType) -> None:
    """Have ``kv_bits`` refused with the first token, not where mlx-lm would begin to quantize."""
    if not upstream.available():
        patching.wrap(module, "maybe_quantize_kv_cache", _maybe_quantize_kv_cache)


def _make_prompt_cache(wrapped, instance, args, kwargs):
    from . import prompt_cache

    caches = wrapped(*args, **kwargs)
    return prompt_cache.compress(args[0] if args else kwargs["model"], caches)


def _save_prompt_cache(wrapped, instance, args, kwargs):
    from . import prompt_cache

    prompt_cache.inform(args[1] if len(args) > 1 else kwargs["cache"])
    return wrapped(*args, **kwargs)


def _load_prompt_cache(wrapped, instance, args, kwargs):
    from . import prompt_cache

    prompt_cache.check_saved(args[0] if args else kwargs["file_name"])
    return wrapped(*args, **kwargs)


def _merge(wrapped, instance, args, kwargs):
    from ..cache import BatchCompressedKVCache, CompressedKVCache

    caches = args[0] if args else kwargs["caches"]
    if any(isinstance(cache, CompressedKVCache) for cache in caches):
        return BatchCompressedKVCache.merge(caches)
    return wrapped(*args, **kwargs)


def _extend(wrapped, instance, args, kwargs):
    from ..cache import BatchCompressedKVCache

    other = args[0] if args else kwargs["other"]
    if not isinstance(other, BatchCompressedKVCache):
        return wrapped(*args, **kwargs)
    return BatchCompressedKVCache.take_over(instance, other)


def _maybe_quantize_kv_cache(wrapped, instance, args, kwargs):
    from . import prompt_cache

    caches = args[0] if args else kwargs["prompt_cache"]
    bits = args[3] if len(args) > 3 else kwargs["kv_bits"]
    if bits is not None:
        prompt_cache.refuse_kv_bits(caches, bits)
    return wrapped(*args, **kwargs)

"""Compressed KV caches for mlx-lm.

Importing this package loads neither mlx nor mlx_lm: the public names are resolved
when they are first used.
"""

__version__ = "0.1.0"
__all__ = ["CompressedKVCache", "__version__", "disable", "enable", "status"]

_HOMES = {
    "CompressedKVCache": "cache",
    "disable": "activation",
    "enable": "activation",
    "status": "reporting",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # the start-up file imports this package

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

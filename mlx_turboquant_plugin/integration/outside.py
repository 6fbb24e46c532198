"""Packages that generate beside mlx-lm, with models and caches of their own."""

from types import ModuleType

from ..log import log_once


def say(module: ModuleType) -> None:
    """Hook of such a package: nothing of it is compressed, which must not go unnoticed."""
    log_once(
        "%s has models and caches of its own, which TurboQuant does not compress; it compresses "
        "what mlx_lm runs, in this program too",
        module.__name__,
    )

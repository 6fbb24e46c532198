"""The hooks of mlx-lm's server.

As in integration/hook.py the rest is imported late: here, once there is a server.
"""

import sys
from types import ModuleType

from .. import patching

SERVER = "mlx_lm.server"


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.server``."""
    from .wrappers import apply

    apply(module)


def patch_cache(module: ModuleType) -> None:
    """Hook of ``mlx_lm.models.cache``: notice a server that runs as ``__main__``.

    What ``python -m`` runs is never imported under its name. It makes its prompt cache just
    before it makes the rest.
    """
    patching.wrap(module.LRUPromptCache, "__init__", _init)


def _init(wrapped, instance, args, kwargs):
    main = sys.modules["__main__"]
    if getattr(getattr(main, "__spec__", None), "name", None) == SERVER:
        patch(main)
    return wrapped(*args, **kwargs)

"""The hooks of mlx-lm's server.

As in integration/hook.py the rest is imported late: here, once there is a server.
"""

import sys
from types import ModuleType

from .. import patching
from ..hooking import SERVER


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.server``."""
    from .wrappers import apply

    apply(module)


def patch_cache(module: ModuleType) -> None:
    """Hook of ``mlx_lm.models.cache``: notice a server that ``python -m`` runs.

    That is ``__main__``, and never imported under its name. It makes its prompt cache just before
    it makes the rest.
    """
    if SERVER in sys.orig_argv:
        patching.wrap(module.LRUPromptCache, "__init__", _init)


def _init(wrapped, instance, args, kwargs):
    main = sys.modules["__main__"]
    if main.__spec__ is not None and main.__spec__.name == SERVER:
        patch(main)
    return wrapped(*args, **kwargs)

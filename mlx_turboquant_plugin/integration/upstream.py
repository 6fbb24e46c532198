"""The hooks of an mlx-lm that has them (see patches/): nothing is monkeypatched there.

What is registered stays registered: mlx-lm's own caches never meet the attention, and
the hook lets them pass while compression is off. Importing this imports nothing of
mlx_lm: it is asked while mlx_lm is being imported.
"""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def available() -> bool:
    """Whether this mlx-lm asks plugins for caches and for the attention over them."""
    from mlx_lm.models import base, cache

    return hasattr(cache, "prompt_cache_hooks") and hasattr(base, "attention_functions")


def register(
    hook: Callable[[Any, list[Any], bool], list[Any]], attend: Callable, kinds: Sequence[Any]
) -> None:
    """Have mlx-lm's prompt caches pass through ``hook``, and serve the classes it brings in.

    Args:
        hook: called with a model, its prompt cache and whether that was just made;
            returns the prompt cache to use.
        attend: called with mlx-lm's ``scaled_dot_product_attention`` and its arguments
            for caches of these classes.
        kinds: cache classes, also to be found by their names in saved prompt caches.
    """
    # Any, since an mlx-lm without the patches has no such names.
    base: Any = import_module("mlx_lm.models.base")
    cache: Any = import_module("mlx_lm.models.cache")
    if hook not in cache.prompt_cache_hooks:
        cache.prompt_cache_hooks.append(hook)
    function = functools.partial(attend, base.scaled_dot_product_attention)
    for kind in kinds:
        kind.hooked = True
        cache.cache_classes[kind.__name__] = kind
        base.attention_functions[kind] = function

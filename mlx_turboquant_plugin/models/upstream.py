"""The hooks of a mlx-lm that has them (see patches/): nothing is monkeypatched there.

Importing this imports nothing of mlx_lm: it is asked while mlx_lm is being imported.
"""

from typing import Any, Callable, List, Sequence


def available() -> bool:
    """Whether this mlx-lm asks others for caches and for their attention."""
    from mlx_lm.models import cache

    return hasattr(cache, "prompt_cache_hooks")


def register(hook: Callable[[Any, List[Any], bool], List[Any]], kinds: Sequence[type]) -> None:
    """Have prompt caches of mlx-lm pass through ``hook``, and the classes found in files."""
    from mlx_lm.models import cache

    if hook not in cache.prompt_cache_hooks:
        cache.prompt_cache_hooks.append(hook)
    for kind in kinds:
        cache.cache_classes[kind.__name__] = kind


def register_attention(attend: Callable, kinds: Sequence[type]) -> None:
    """Have attention over caches of these classes done by ``attend``.

    Args:
        attend: called like mlx-lm's ``scaled_dot_product_attention``.
    """
    from mlx_lm.models import base

    for kind in kinds:
        base.attention_functions[kind] = attend

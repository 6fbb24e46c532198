"""Looking at a prompt cache file before mlx-lm reads it."""

import os

from mlx_lm.models import cache as mlx_lm_cache
from safetensors import SafetensorError, safe_open

REMEDY = "make it again with mlx_lm.cache_prompt or save_prompt_cache"


def check_file(path: str | os.PathLike) -> list[str]:
    """The classes of the caches in ``path``, a whole file of mlx-lm's ``save_prompt_cache``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, not a safetensors file, not a prompt cache, or
            holds caches of a class that is not known here.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"prompt cache {path}: no such file: {REMEDY}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"prompt cache {path}: damaged or cut short ({error}): {REMEDY}"
        ) from error
    # save_prompt_cache flattens [metadata, class names, scalars].
    classes = [name for key, name in metadata.items() if key.startswith("1.")]
    if not classes:
        raise ValueError(f"prompt cache {path}: not a file of mlx-lm's save_prompt_cache: {REMEDY}")
    for name in sorted(set(classes)):
        if not hasattr(mlx_lm_cache, name):
            raise ValueError(
                f"prompt cache {path}: holds caches of the class {name}, which this version "
                f"of mlx-lm and its plugins do not have: {REMEDY}"
            )
    return classes

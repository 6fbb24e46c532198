"""The user's cache folder, where files go that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """This package's folder in it; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx_turboquant"

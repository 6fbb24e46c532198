"""Which models are supported; another package adds its own with these two."""

from .attention import patch_family
from .family import Family

__all__ = ["Family", "patch_family"]

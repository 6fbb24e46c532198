"""Where a model came from, for opting out and for per-model settings."""

import re
from types import ModuleType
from typing import Any

from .. import patching
from ..settings import ModelIdentity
from . import upstream

# The Hugging Face Hub's cache keeps org/name in models--org--name/snapshots/<commit>.
_HUB_FOLDER = re.compile(r"models--(.+?)--(.+?)[/\\]snapshots[/\\]")


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.utils``: remember the path that each model is loaded from."""
    if not upstream.available():
        patching.wrap(module, "load_model", _load_model)


def identity_of(model: Any) -> ModelIdentity:
    """What is known about ``model``: its type, and its path and hub id if mlx_lm loaded it."""
    path = getattr(model, "model_path", None)
    hub = _HUB_FOLDER.search(f"{path}/") if path else None
    return ModelIdentity(
        type=str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2])),
        path=path,
        hub_id="/".join(hub.groups()) if hub else None,
    )


def _load_model(wrapped, instance, args, kwargs):
    model, config = wrapped(*args, **kwargs)
    path = args[0] if args else kwargs["model_path"]
    model.model_path = str(path)
    return model, config

"""What tells prompt caches of one model and its settings from all others.

Of large weights a part is looked at, as for statistics; a model's configuration is as a whole.
"""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..integration.calibration_file import fingerprint
from ..integration.family import attention_of, layers_of
from ..integration.identity import identity_of
from ..settings import Settings, in_force

# Settings that say nothing of what caches hold.
APART = {"preset", "kernel", "opt_out", "log", "memory_budget", "disk_cache", "sources"}


def name_of(*models: nn.Module | None) -> str:
    """A name for models whose caches go together: of their weights and their settings."""
    digest = hashlib.sha256()
    for model in models:
        if model is not None:
            attentions = [attention_of(layer)[0] for layer in layers_of(model)]
            digest.update(fingerprint(model, attentions, mx.zeros(1, mx.int32)).encode())
            digest.update(repr((_configuration(model), _settings_of(model))).encode())
    return digest.hexdigest()[:32]


def names_of(provider: Any) -> Callable[[Any], str | None]:
    """The names of the models that mlx-lm's ModelProvider has loaded, by their ``model_key``.

    One that was never asked for while it was loaded has none.
    """
    known: dict[Any, str] = {}

    def name(key: Any) -> str | None:
        if key not in known and key == provider.model_key:
            known[key] = name_of(provider.model, provider.draft_model)
        return known.get(key)

    return name


def _configuration(model: nn.Module) -> list[str]:
    """What is not in the weights: window sizes, epsilons, factors."""
    numbers = (
        f"{path}.{name}={value!r}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple)) and not name.startswith("_")
    )
    return [*sorted(numbers), repr(getattr(model, "args", None))]


def _settings_of(model: nn.Module) -> list[Any]:
    identity = identity_of(model)
    chosen = in_force().for_model(identity)
    named = (field.name for field in fields(Settings) if field.name not in APART)
    return [*((name, getattr(chosen, name)) for name in named), chosen.opted_out(identity)]

"""The arms of a comparison: ways to keep keys and values, each beside the exact run."""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache

from .. import settings
from ..cache import CompressedKVCache
from ..rules import BYPASSES, PRESETS, SHAPING
from .runs import compressed, compressed_prompt_cache, prompt_cache, settings_of

MLX_LM_GROUP = 64


@dataclass(frozen=True)
class Arm:
    """One way to keep keys and values.

    Attributes:
        name: what tables call it.
        settings: of the plugin; None leaves it off.
        mlx_lm_bits: use mlx-lm's own QuantizedKVCache of that many bits, in its groups of 64.
        layer: compress this layer alone; None stands for all.
    """

    name: str
    settings: Mapping[str, Any] | None = None
    mlx_lm_bits: int | None = None
    layer: int | None = None

    def on(self) -> AbstractContextManager:
        """What must be in force while the arm makes caches and while it runs.

        Every query reads what it would read in decoding: else it would read its chunk's own
        tokens in full precision, the more the longer the chunk, which would flatter the codes.
        """
        in_force = self.in_force
        return nullcontext() if in_force is None else compressed(**in_force)

    @property
    def in_force(self) -> dict[str, Any] | None:
        """The settings that are in force while it runs, as far as the arm decides them."""
        return None if self.settings is None else {"invariant": True, **self.settings}

    @property
    def described(self) -> dict[str, Any]:
        """The arm's settings by the names that the plugin or mlx-lm has for them."""
        if self.mlx_lm_bits is not None:
            return {"kv_bits": self.mlx_lm_bits, "kv_group_size": MLX_LM_GROUP}
        return self.in_force or {}

    @property
    def codes(self) -> bool:
        """Whether keys and values are stored in fewer bits."""
        ours = self.settings is not None and self.settings.get("bypass") != "identity"
        return ours or self.mlx_lm_bits is not None

    def caches(self, model: nn.Module) -> list[Any]:
        """Empty caches, one for each layer of ``model``; inside ``on()``.

        Raises:
            SettingsError: the model can't be compressed.
        """
        if self.mlx_lm_bits is not None:
            return [QuantizedKVCache(MLX_LM_GROUP, self.mlx_lm_bits) for _ in prompt_cache(model)]
        if self.settings is None:
            return prompt_cache(model)
        caches = compressed_prompt_cache(model)
        if self.layer is None:
            return caches
        return [
            cache
            if index == self.layer or not isinstance(cache, CompressedKVCache)
            else cache.to_exact()
            for index, cache in enumerate(caches)
        ]

    def only(self, layer: int) -> "Arm":
        """The same arm with one layer compressed and the others exact."""
        return replace(self, name=f"{self.name}, layer {layer}", layer=layer)


EXACT = Arm("exact")

# Whatever the environment says: what is measured as a preset is the preset.
PRESET_ARMS: dict[str, Arm] = {
    name: Arm(name, {"preset": name, **settings.of_preset(name).shaping}) for name in PRESETS
}
BESIDE: dict[str, Arm] = {
    **{
        bypass: Arm(bypass, {**(PRESET_ARMS["default"].settings or {}), "bypass": bypass})
        for bypass in BYPASSES
    },
    "mlx-lm-4bit": Arm("mlx-lm-4bit", mlx_lm_bits=4),
    "mlx-lm-8bit": Arm("mlx-lm-8bit", mlx_lm_bits=8),
}
CONFIGURED = "configured"


def configured(model: nn.Module, arms: Sequence[Arm], **overrides: Any) -> tuple[Arm, str] | None:
    """The arm that the environment and the settings file ask for, and what they set, in words.

    Args:
        model: the first table of the file that matches it counts.
        **overrides: settings that are stronger than either.

    Returns:
        None if nothing is set that shapes what is kept, or if it comes to one of ``arms``.

    Raises:
        SettingsError: a setting is not allowed, or bits are given for another number of layers.
    """
    chosen = settings_of(model, **overrides)
    arm = Arm(CONFIGURED, {"preset": chosen.preset, **chosen.shaping})
    words = chosen.shaped_by()
    if not words or any(_shape(arm) == _shape(other) for other in arms):
        return None
    # Where the arm's own settings are from nobody would know any more.
    chosen.for_layers(len(prompt_cache(model)))
    return arm, words


def not_measured(model: nn.Module, run: Mapping[str, Any] | None) -> list[str]:
    """A line about settings that are not in force where those of ``run`` are."""
    words = settings_of(model).shaped_by(unlike=run)
    return [f"not in force here, but in compare: {words}"] if words else []


def _shape(arm: Arm) -> dict[str, Any]:
    return {name: value for name, value in (arm.settings or {}).items() if name in SHAPING}


class Run:
    """An arm that reads one sequence.

    Attributes:
        caches: made with the first tokens.
        seconds: spent on tokens so far.
        tokens: how many that were.
    """

    def __init__(self, arm: Arm, model: nn.Module):
        self.arm = arm
        self.caches: list[Any] = []
        self.seconds, self.tokens = 0.0, 0
        self._model = model

    def fork(self) -> "Run":
        """Another run that has read the same tokens."""
        other = Run(self.arm, self._model)
        other.caches = copy.deepcopy(self.caches)
        return other

    def read(self, tokens: mx.array, chunk: int) -> mx.array:
        """Read ``tokens`` (L,), ``chunk`` at a time; the logits of the last chunk."""
        for start in range(0, tokens.size, chunk):
            logits = self(tokens[start : start + chunk])
        return logits

    def __call__(self, inputs: mx.array) -> mx.array:
        """Logits (N, vocabulary) of the next tokens ``inputs`` (N,)."""
        with self.arm.on():
            # In the same block as the first forward pass: a cache learns from the model
            # which codec it has, and the model knows the settings that came last.
            self.caches = self.caches or self.arm.caches(self._model)
            start = time.perf_counter()
            logits = self._model(inputs[None], cache=self.caches)[0]
            mx.eval(logits, [cache.state for cache in self.caches])
        self.seconds += time.perf_counter() - start
        self.tokens += inputs.size
        return logits

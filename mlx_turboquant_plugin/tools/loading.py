"""Loading a model, and what to do about one that can't be loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm import utils as mlx_lm_utils

from ..rules import SettingsError

# Of the reason that an error gives.
SHOWN_CHARACTERS = 160
FOLDER = "name a folder with a model that mlx_lm.load can read, or a model on the Hub"


class NotLoaded(SettingsError):
    """A model can't be loaded; the message says why and what to do."""


class Numbers:
    """Stands in for a tokenizer that a model lacks: tokens are shown as their ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as text."""
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` gives.

    Attributes:
        config: the model's configuration as mlx-lm read it.
    """

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]

    @property
    def context(self) -> int | None:
        """The most tokens that the model is made for; None if its configuration doesn't say."""
        return context(self.config)

    def beyond_context(self, length: int, what: str) -> list[str]:
        """A line if ``length`` tokens, which ``what`` has, are more than that; else none."""
        if self.context is None or length <= self.context:
            return []
        return [
            f"{what} {length} tokens, more than the {self.context} that the model is made for: "
            "what any run says beyond these may mean nothing"
        ]


def load(path: str, needs_tokenizer: bool) -> Loaded:
    """What ``mlx_lm.load`` makes of ``path``; without a tokenizer, if need be, its weights alone.

    Raises:
        NotLoaded: mlx-lm can't load it.
    """
    try:
        return Loaded(*mlx_lm.load(path, return_config=True))
    except Exception as error:  # Files can be damaged in any way.
        problem = why(error)
        # What stays in its frames may be gigabytes.
        error.__traceback__ = None
    if not Path(path).is_dir():
        raise NotLoaded(f"--model is {path!r}, which can't be loaded ({problem}): {FOLDER}")
    try:
        model, config = mlx_lm_utils.load_model(Path(path))
    except Exception as error:
        raise NotLoaded(
            f"--model is {path!r}, which can't be loaded ({problem}): {remedy(Path(path))}"
        ) from error
    if needs_tokenizer:
        raise NotLoaded(
            f"--model is {path!r}, whose tokenizer can't be loaded ({problem}): download it again; "
            "--tokens FILE without --tasks needs none"
        )
    return Loaded(model, Numbers(), config)


def why(error: BaseException) -> str:
    """The first line of what an error says, shortened, behind its kind unless that is plain."""
    first = next(iter(str(error).strip().splitlines()), "").rstrip(" :.")
    if not first or not isinstance(error, OSError | ValueError | RuntimeError):
        first = f"{type(error).__name__}: {first}".removesuffix(": ")
    return first if len(first) <= SHOWN_CHARACTERS else first[:SHOWN_CHARACTERS] + " ..."


def remedy(folder: Path) -> str:
    """What to do about a folder that mlx-lm can make no model of, by what is wrong with it."""
    if not (folder / "config.json").is_file():
        return FOLDER
    correct = "correct its config.json"
    try:
        config = mlx_lm_utils.load_config(folder)
        config["model_type"]
    except Exception:  # A configuration can hold anything.
        return correct
    try:
        model_class, arguments = mlx_lm_utils._get_classes(config)
    except ValueError:
        return "choose a model of a type that this mlx-lm has, or install a newer mlx-lm"
    except Exception:
        return correct
    try:
        model_class(arguments.from_dict(config))
    except Exception:
        return correct
    if not any(folder.glob("model*.safetensors")):
        return "it has no model*.safetensors: download its weights"
    return "its weights are damaged or do not go with its config.json: download them again"


def context(config: dict[str, Any]) -> int | None:
    """The most tokens that a model of this configuration is made for, if it says so."""
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings")
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    # YaRN's, which some configurations leave out of the limit.
    original = scaling.get("original_max_position_embeddings")
    if limit and original and scaling.get("factor"):
        limit = max(limit, int(original * scaling["factor"]))
    return limit

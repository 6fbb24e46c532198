"""Arguments that several subcommands have, and what they stand for."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..rules import PRESETS
from . import texts
from .runs import prompt_cache

# A name that ends like one of these promises it.
FORMATS = {"csv", "html", "jpeg", "jpg", "json", "pdf", "png", "svg"}


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` up, or up to ``high``."""
    allowed = f"from {low} up" if high is None else f"from {low} to {high}"

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return int(text)

    return number


def input_file(text: str) -> str:
    """An argparse type: the name of a file to read."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no name of a file")
    return text


class Distinct(argparse.Action):
    """Stores the values of an option without repetitions: each is measured once."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store them in their order."""
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def output_file(form: str) -> Callable[[str], Path]:
    """An argparse type: a file of the format ``form`` that can be written now."""

    def file(text: str) -> Path:
        path = Path(text)
        problem = "it is no name: give one" if not text else _problem(path, form)
        if problem:
            raise argparse.ArgumentTypeError(f"{text!r} can't be written: {problem}")
        return path

    return file


def _problem(path: Path, form: str) -> str | None:
    """Why ``path`` can't be written, and what to do; None if it can."""
    if path.is_dir():
        return "it is a folder: name a file in it"
    folder = path.absolute().parent
    if not folder.is_dir():
        lowest = next(above for above in (folder, *folder.parents) if above.exists())
        if not lowest.is_dir():
            return f"{lowest} is a file: name a folder"
        return f"there is no folder {folder}: make it"
    other = path.suffix[1:].lower()
    if other in FORMATS - {form}:
        return f"it is named like {other}, and {form} is written: name it .{form}"
    try:
        _try_to_write(path)
    except OSError as error:
        return f"{error.strerror}: choose another place"
    return None


def _try_to_write(path: Path) -> None:
    """Raise OSError if that fails. Permissions alone don't tell: of /proc, for one."""
    if path.exists() and not path.is_file():
        return  # A pipe would end for its reader.
    new = not os.path.lexists(path)
    path.open("ab").close()
    if new:
        path.unlink()


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--json``."""
    parser.add_argument(
        "--json",
        type=output_file("json"),
        metavar="FILE",
        help="write everything that was measured",
    )


def add_preset_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--preset``."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        choices=list(PRESETS),
        default="default",
        help=f"one of {', '.join(PRESETS)} (default)",
    )


def add_text_arguments(parser: argparse.ArgumentParser, windows: int) -> None:
    """Declare the model, the text, and how it is cut; ``windows`` is the default."""
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder or Hub name of a model"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        type=input_file,
        metavar="FILE",
        help="a text in UTF-8 (the manual that Python brings)",
    )
    source.add_argument(
        "--tokens",
        type=input_file,
        metavar="FILE",
        help="token ids as .npy, the first one is bos",
    )
    parser.add_argument(
        "--windows",
        type=at_least(1),
        metavar="N",
        default=windows,
        help=f"pieces of text ({windows})",
    )
    parser.add_argument(
        "--length", type=at_least(2), metavar="N", default=2048, help="tokens of each (2048)"
    )
    parser.add_argument(
        "--chunk", type=at_least(1), metavar="N", default=128, help="tokens per forward pass (128)"
    )


def read_windows(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> list[np.ndarray]:
    """The windows of token ids that the arguments ask for.

    Raises:
        SettingsError: the text can't be read, is too short, or is not for this model.
    """
    if args.tokens:
        tokens = texts.read_token_file(args.tokens)
    else:
        tokens = texts.read_text_file(args.text, tokenizer)
    first_repeats = bool(args.tokens) or tokens[:1] == [tokenizer.bos_token_id]
    windows = texts.windows(tokens, args.windows, args.length, first_repeats)
    # Never evaluated: the shape is known without.
    logits = model(mx.zeros((1, 1), mx.int32), cache=prompt_cache(model))
    source = f"--tokens {args.tokens!r}" if args.tokens else "the tokenizer of --model"
    texts.check_ids(np.concatenate(windows), logits.shape[-1], source)
    return windows

"""Arguments that several subcommands have, and what they stand for."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..rules import PRESETS, SettingsError
from . import texts
from .runs import prompt_cache

# A name that ends like one of these promises it.
FORMATS = {"csv", "html", "jpeg", "jpg", "json", "pdf", "png", "svg"}


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below ``low``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} up")
        return int(text)

    return number


def output_file(form: str) -> Callable[[str], Path]:
    """An argparse type: a file of the format ``form`` that can be written now."""

    def file(text: str) -> Path:
        path = Path(text)
        folder = path.absolute().parent
        other = path.suffix[1:].lower()
        for wrong, why in (
            (path.is_dir(), "it is a folder: name a file in it"),
            (not folder.is_dir(), f"there is no folder {folder}: make it"),
            (
                other in FORMATS - {form},
                f"it is named like {other}, and {form} is written: name it .{form}",
            ),
        ):
            if wrong:
                raise argparse.ArgumentTypeError(f"{text!r} can't be written: {why}")
        try:
            _try_to_write(path)
        except OSError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} can't be written: {error.strerror}"
            ) from error
        return path

    return file


def _try_to_write(path: Path) -> None:
    """Raise OSError if that fails. Permissions alone don't tell: of /proc, for one."""
    if path.exists() and not path.is_file():
        return  # A pipe would end for its reader.
    new = not os.path.lexists(path)
    path.open("ab").close()
    if new:
        path.unlink()


def write(path: Path, text: str) -> None:
    """Write a file in UTF-8.

    Raises:
        SettingsError: it can't be written.
    """
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise SettingsError(
            f"{str(path)!r} can't be written ({error}): choose another place"
        ) from error


def show(lines: Iterable[str], *files: tuple[Path | None, Callable[[], str]]) -> None:
    """Print ``lines``; then write the files, even if nobody reads the lines any more.

    Args:
        files: where each goes, None for nowhere, and what makes its text.

    Raises:
        SettingsError: a file can't be written.
    """
    try:
        sys.stdout.write("\n".join(lines) + "\n")
    finally:
        for path, text in files:
            if path:
                write(path, text())


def as_json(data: Any) -> str:
    """What a JSON file of a command holds."""
    return json.dumps(data, indent=1) + "\n"


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
        "--text", metavar="FILE", help="a text in UTF-8 (the manual that Python brings)"
    )
    source.add_argument("--tokens", metavar="FILE", help="token ids as .npy, the first one is bos")
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
    texts.check_ids(np.concatenate(windows), logits.shape[-1])
    return windows

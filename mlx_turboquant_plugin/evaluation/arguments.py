"""Arguments that several subcommands have, and what they stand for."""

import argparse
from typing import Any, Callable, List

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import texts
from .runs import prompt_cache


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below ``low``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} up")
        return int(text)

    return number


def add_text_arguments(parser: argparse.ArgumentParser, windows: int) -> None:
    """Declare the model, the text, and how it is cut; ``windows`` is the default."""
    parser.add_argument("--model", required=True, help="folder or Hub name of a model")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="a text in UTF-8 (Python's own manual)")
    source.add_argument("--tokens", metavar="FILE", help="token ids as .npy, the first one is bos")
    parser.add_argument(
        "--windows", type=at_least(1), default=windows, help=f"pieces of text ({windows})"
    )
    parser.add_argument("--length", type=at_least(2), default=2048, help="tokens of each (2048)")
    parser.add_argument(
        "--chunk", type=at_least(1), default=128, help="tokens per forward pass (128)"
    )


def read_windows(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> List[np.ndarray]:
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

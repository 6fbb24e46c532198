"""Token ids to evaluate on, cut into windows."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from ..rules import SettingsError


def read_token_file(path: str) -> np.ndarray:
    """The token ids (T,) of a .npy file.

    Raises:
        SettingsError: the file can't be read or holds something else.
    """
    advice = "save a one-dimensional array of whole numbers with numpy.save"
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SettingsError(
            f"--tokens is {path!r}, which can't be read ({error}): {advice}"
        ) from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        shown = getattr(tokens, "dtype", type(tokens).__name__)
        raise SettingsError(
            f"--tokens is {path!r}, which holds {shown} of shape {getattr(tokens, 'shape', '?')}: "
            f"{advice}"
        )
    if not tokens.size:
        raise SettingsError(f"--tokens is {path!r}, which is empty: save some token ids in it")
    return tokens.astype(np.int64)


def read_text_file(path: str | None, tokenizer: Any) -> np.ndarray:
    """The token ids (T,) of a text, as the tokenizer makes them.

    Args:
        path: None stands for the manual that every Python brings along, half a million
            characters of English and code.

    Raises:
        SettingsError: the file can't be read as UTF-8, or is empty.
    """
    if path is None:
        return np.array(tokenizer.encode("\n".join(topics.values())), dtype=np.int64)
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--text is {path!r}, which can't be read ({error}): name a text file in UTF-8"
        ) from error
    if not text.strip():
        raise SettingsError(f"--text is {path!r}, which is empty: name a text file with some text")
    return np.array(tokenizer.encode(text), dtype=np.int64)


def windows(tokens: np.ndarray, count: int, length: int, first_repeats: bool) -> list[np.ndarray]:
    """The first ``count`` windows of ``length`` tokens.

    Args:
        first_repeats: begin every window with the first token (the bos token) and
            continue with length - 1 tokens of the text.

    Raises:
        SettingsError: there are not enough tokens.
    """
    head, text = (tokens[:1], tokens[1:]) if first_repeats else (tokens[:0], tokens)
    step = length - len(head)
    if len(text) < count * step:
        enough = len(text) // step
        room = f"enough for {enough}" if enough else "less than one window takes"
        fewer = "fewer or shorter windows" if count > 1 else "a shorter window"
        raise SettingsError(
            f"--windows is {count} and --length is {length}, which takes "
            f"{len(head) + count * step} tokens, but there are {len(tokens)}, {room}: choose "
            f"{fewer}, or a longer text"
        )
    return [np.concatenate([head, text[i * step : (i + 1) * step]]) for i in range(count)]


def check_ids(tokens: np.ndarray, vocabulary: int, source: str) -> None:
    """Raise SettingsError if an id is not one of the model's ``vocabulary`` ids.

    Args:
        source: where the tokens are from, in words.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise SettingsError(
            f"{source} gives ids from {low} to {high}, but the model has those from 0 to "
            f"{vocabulary - 1}: use tokens of this model's own tokenizer"
        )

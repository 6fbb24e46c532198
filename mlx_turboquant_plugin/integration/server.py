"""What mlx_lm.server says in its log of each model that it serves."""

import sys
from collections.abc import Sequence
from typing import Any

from ..hooking import SERVER
from ..log import logger
from ..settings import Settings
from .sizes import Sizes

LENGTHS = (8192, 32768)


def serving() -> bool:
    """Whether this process is mlx_lm.server, however it was started."""
    program = getattr(sys.modules.get("__main__"), "__spec__", None)
    return SERVER in sys.modules or getattr(program, "name", None) == SERVER


def announce(
    model: Any,
    name: str,
    chosen: Settings,
    kernel: str,
    own: Sequence[Any],
    compressed: Sequence[Any],
) -> None:
    """Log in one line what ``compressed``, in the place of mlx-lm's ``own`` caches, save."""
    try:
        sizes = Sizes(model, own)
        parts = [
            f"{sizes.at(own, count) / taken:.2f} times smaller at {count} tokens "
            f"({taken / 1e6:.1f} MB)"
            for count in LENGTHS
            for taken in [sizes.at(compressed, count)]
        ]
    except Exception:  # Whatever a model does with a token: the server is to serve.
        logger.debug("the failure in full", exc_info=True)
        parts = ["its size is not known"]
    logger.info(
        "%s: preset %s, window %d, kernel %s; KV cache %s",
        name,
        chosen.preset,
        chosen.window,
        kernel,
        ", ".join(parts),
    )

"""How far a command is: a bar on a terminal, a line now and then where there is none."""

import logging
import sys
from typing import Any

from tqdm import tqdm

# Seconds between two lines.
PAUSE = 30

logger = logging.getLogger(__name__)


def progress(total: int, unit: str) -> tqdm:
    """A context whose ``update(n)`` adds to what is done of ``total``, on stderr."""
    options: dict[str, Any] = {"total": total, "unit": f" {unit}", "leave": False}
    if not sys.stderr.isatty():
        pause = {"delay": PAUSE, "mininterval": PAUSE, "maxinterval": 2 * PAUSE}
        options.update(pause, file=_Lines(), ncols=0)
    return tqdm(**options)


class _Lines:
    """What a bar writes to as to a terminal, as lines of the log."""

    def write(self, text: str) -> None:
        # A bar is overwritten, and in the end by nothing.
        if text.strip():
            logger.info("%s", text.strip())

    def flush(self) -> None:
        pass

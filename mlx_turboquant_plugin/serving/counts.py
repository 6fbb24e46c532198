"""What a server has done so far, for its page of metrics."""

from collections import Counter
from dataclasses import dataclass, field

MEMORY, DISK = "memory", "disk"


@dataclass
class Counts:
    """Totals since the server started.

    Args:
        hits: prompts of which some was found, by where: MEMORY or DISK.
        tokens_saved: how many tokens these need not process again, by where.
        misses: prompts of which nothing was found.
        refused: requests that can never fit into the memory budget.
        written: prompt caches that were written to disk.
    """

    hits: Counter[str] = field(default_factory=Counter)
    tokens_saved: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    refused: int = 0
    written: int = 0

    def found(self, where: str | None, tokens: int) -> None:
        """Count a look-up that found ``tokens`` of a prompt there, or none."""
        if where is None or tokens == 0:
            self.misses += 1
        else:
            self.hits[where] += 1
            self.tokens_saved[where] += tokens

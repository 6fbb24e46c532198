"""Who sees what: which tokens a query reads exactly and which through their codes."""

from dataclasses import dataclass

# Tokens that are encoded at once. Small, so that little more than the window is
# kept exact; large enough that almost no step of decoding encodes anything.
BLOCK = 32

# How far a cache can be trimmed without any trace: speculative decoding rewinds by
# a few tokens, and exact tokens that a later query gave up must still be there.
ROLLBACK = 16


@dataclass(frozen=True)
class Visibility:
    """A function of two absolute positions and of nothing else.

    A query at position p reads the key at t exactly if t is one of the first
    ``sinks`` tokens, or if t's block of 32 tokens is at most ``window`` / 32
    blocks older than p's; it reads every other key through its codes. It never
    matters how a prompt was cut into chunks or when codes were written.

    Attributes:
        window: a multiple of 32; at least that many newest tokens are exact.
        sinks: the number of first tokens that are always exact.
    """

    window: int = 192
    sinks: int = 4

    def exact_from(self, position: int) -> int:
        """The first position, after the sinks, that a query at ``position`` reads exactly."""
        return max(self.sinks, (position // BLOCK) * BLOCK - self.window)

"""``mlx_turboquant bench``: speed and memory against mlx-lm's own caches, side by side.

Machines are noisy: what counts are ratios, whose sides take turns in one process.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]

"""Types of command-line arguments."""

import argparse
from typing import Callable


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below ``low``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} up")
        return int(text)

    return number

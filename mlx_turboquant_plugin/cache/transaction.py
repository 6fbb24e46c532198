"""Changes of caches that are made whole or not at all."""

from typing import Any


class AllOrNothing:
    """Puts the attributes of objects back if the block ends with an exception, Ctrl-C included.

    Arrays are never written into, so the attributes are all that a cache is.
    """

    __slots__ = ("_before", "_objects")

    def __init__(self, *objects: Any):
        self._objects = objects
        self._before = [x.__dict__.copy() for x in objects]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            for x, before in zip(self._objects, self._before):
                x.__dict__ = before

"""The plugin's log on stderr, when ``TURBOQUANT_LOG`` asks for one."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__package__)
_handler: logging.Handler | None = None


def start(level: str | None) -> None:
    """Write messages of this level and above to stderr; None leaves logging alone."""
    global _handler
    if level is None:
        return
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(level)
    # Without this an application's root handler would repeat every line.
    logger.propagate = False


def stop() -> None:
    """Undo :func:`start`, and let :func:`log_once` say everything again."""
    global _handler
    log_once.cache_clear()
    if _handler is not None:
        logger.removeHandler(_handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        _handler = None


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Write what one module logs from INFO up to stderr meanwhile, and nowhere else."""
    told, handler = logging.getLogger(name), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    told.addHandler(handler)
    told.setLevel(logging.INFO)
    told.propagate = False
    try:
        yield
    finally:
        told.removeHandler(handler)
        told.setLevel(logging.NOTSET)
        told.propagate = True


@contextmanager
def unheard() -> Iterator[None]:
    """Meanwhile Python's last resort, stderr, hears nothing: what is logged is reported anyway."""
    silence = logging.NullHandler()
    logger.addHandler(silence)
    try:
        yield
    finally:
        logger.removeHandler(silence)


@functools.cache
def log_once(message: str, *args) -> None:
    """Warn about something that is the same for every cache, once until :func:`stop`."""
    logger.warning(message, *args)

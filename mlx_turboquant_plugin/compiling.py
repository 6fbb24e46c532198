"""``mx.compile`` on the CPU: whether it works here, and nobody waits for it.

There MLX has g++ build a library of each function that it fuses, which takes a second, and
keeps it in the folder for temporary files. Meanwhile no thread gets at any compiled function. So
another process (:mod:`building`) fills that folder, and until it is done functions run as they
are: prompts about as fast, decoding slower. On a GPU MLX needs no C++ compiler and no such help.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from . import __version__
from .log import logger

_lock = threading.Lock()
_builders: dict[str, subprocess.Popen | None] = {}
_asked = _building = _here = False


def compiled(function: Callable) -> Callable:
    """``function`` under ``mx.compile``, for any shapes; as it is while another process compiles.

    Both give the same but for rounding.
    """
    fused = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*args):
        # With a compiler that fails, asking switches ``mx.compile`` off.
        if not _asked:
            problem()
        return (function if _building else fused)(*args)

    return call


def problem() -> str | None:
    """Why MLX compiles nothing for the CPU and what to do, or None. Asks MLX once, then remembers.

    With a compiler that fails every run of mlx_lm would end in an error: ``mx.compile`` is
    switched off then, for all.
    """
    global _asked
    if mx.default_device().type == mx.gpu:
        return None
    with _lock:
        found = _problem()
    _asked = True
    return found


@functools.cache
def _problem() -> str | None:
    traces = []
    number = _compiler_id()

    def probe(x):
        traces.append(x)
        return x * number + x

    function = mx.compile(probe)
    try:
        mx.eval([function(mx.ones(2)) for _ in range(2)])
    except RuntimeError as error:
        mx.disable_compile()
        cause, remedy = "g++ fails", "reinstall g++"
        if "filesystem error" in str(error):
            cause = "the folder for temporary files can't be used"
            remedy = "set TMPDIR to one that exists and can be written to"
        logger.warning("mx.compile is switched off, which is slower: %s: %s", cause, remedy)
        logger.debug("the failure in full", exc_info=True)
        return f"{cause} and MLX runs it uncompiled, slower: {remedy}"
    if len(traces) == 1:
        return None
    if "MLX_DISABLE_COMPILE" in os.environ:
        return "MLX_DISABLE_COMPILE is set and MLX runs it uncompiled, slower: unset it"
    return (
        "without a C++ compiler MLX runs it uncompiled, slower: install g++ "
        "(Debian: apt-get install g++; macOS: xcode-select --install)"
    )


def _compiler_id() -> float:
    """A number from 1 to 2: another g++ must not be taken for the one that built a library."""
    path = shutil.which("g++")
    stat = path and os.stat(path)
    identity = stat and (path, stat.st_mtime_ns, stat.st_size)
    return 1 + (zlib.crc32(repr(identity).encode()) >> 9) / 2**23


def prepare(job: str) -> None:
    """Have what a codec needs compiled by another process, unless that was done before.

    There must be no :func:`problem`. The next :func:`update` sees whether it is done.

    Args:
        job: see :mod:`building`.
    """
    if mx.default_device().type == mx.gpu or _here:
        return
    with _lock:
        if job not in _builders:
            _builders[job] = None if finished(job).exists() else _start(job)
            _update()


def here() -> None:
    """Compile in this process from now on, and wait: for measurements and tests."""
    global _here, _building
    problem()
    with _lock:
        _here, _building = True, False


def update() -> None:
    """Compile from now on if what was asked for is ready. Not in the midst of a generation."""
    with _lock:
        _update()


def uncompiled() -> str | None:
    """Why functions run as they are: a :func:`problem`, or they are not ready yet."""
    if _building:
        return "still being built, once for this machine: it runs uncompiled meanwhile, slower"
    return problem()


def finished(job: str) -> Path:
    """The file that says so; it goes when the libraries go."""
    name = f"turboquant-{__version__}-{zlib.crc32(job.encode()):08x}"
    version = mx.__version__  # type: ignore[attr-defined]
    return Path(tempfile.gettempdir()) / "mlx" / version / "cpu" / name


def _update() -> None:
    global _building
    builders = () if _here else _builders.values()
    _building = any(builder and builder.poll() is None for builder in builders)


def _start(job: str) -> subprocess.Popen | None:
    command: list[str] = [sys.executable, "-m", f"{__package__}.building", job]
    try:
        builder = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TURBOQUANT": "0"},
        )
    except OSError as error:
        logger.info("nothing is compiled ahead: %s", error)
        return None
    # What it has built by then stays.
    atexit.register(builder.terminate)
    return builder

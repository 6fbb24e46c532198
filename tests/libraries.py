"""What the emulators have compiled: once for all processes, and for later runs."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def compiled(name: str, build: Callable[[Path], object], *content) -> Path:
    """A file of this name, that ``build`` has written, or now writes, where it is told to.

    ``content`` is all that it depends on, by ``repr``.

    Raises:
        PermissionError: the folder for such files is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"emulators-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else: remove it, or set TMPDIR")
    digest = hashlib.sha256(repr((name, content)).encode()).hexdigest()[:24]
    path = folder / digest / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            build(made)
            os.replace(made, path)  # whole or not at all, whoever else builds the same
    return path

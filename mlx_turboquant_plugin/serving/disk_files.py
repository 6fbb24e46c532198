"""The files of the disk cache: names, checksums, and what a killed writer leaves."""

import fcntl
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as cache_module
from safetensors import safe_open

from ..log import logger

FORMAT = "turboquant-disk-cache/1"
SUFFIX, PART = ".safetensors", ".part.safetensors"
_NAME = re.compile(r"[0-9a-f]{32}-([0-9a-f]{8})\.safetensors")
_CHUNK = 2**22


class Entry(NamedTuple):
    """A file, whether its caches can be cut to a part of their tokens, and its bytes."""

    path: Path
    trimmable: bool
    nbytes: int


def write(folder: Path, model: str, tokens: list[int], caches: list[Any], trimmable: bool) -> Entry:
    """Write evaluated caches of ``tokens``, whole or not at all."""
    # Whoever reads the tokens reads the prompts.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = " ".join(map(str, tokens))
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    metadata = {"format": FORMAT, "model": model, "tokens": text, "trimmable": str(int(trimmable))}
    part = folder / f"{name}.{os.getpid()}{PART}"
    try:
        with open(part, "wb", opener=_private) as held:
            # Released however this process ends: see remove_leftovers().
            fcntl.flock(held, fcntl.LOCK_EX)
            cache_module.save_prompt_cache(str(part), caches, metadata)
            path = folder / f"{name}-{_checksum(part):08x}{SUFFIX}"
            entry = Entry(path, trimmable, part.stat().st_size)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return entry


def read(path: Path, model: str) -> list[Any] | None:
    """The caches in a file, or None if it is gone, or damaged: then it is removed."""
    try:
        same = _checksum(path) == _checksum_of(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("the disk cache file %s can't be read: %s", path, error)
        return None  # Another server's files are bounded by the same size.
    try:
        if not same:
            raise ValueError("its checksum is another")
        caches, metadata = cache_module.load_prompt_cache(str(path), return_metadata=True)
        if (metadata["format"], metadata["model"]) != (FORMAT, model):
            raise ValueError("it is of another model")
        # Until here nothing but the header may have been read.
        mx.eval([cache.state for cache in caches])
        os.utime(path)
    except (OSError, MemoryError) as error:
        logger.warning("the disk cache file %s can't be read: %s", path, error)
        return None
    except Exception as error:
        logger.warning("the disk cache file %s is damaged and removed: %s", path, error)
        path.unlink(missing_ok=True)
        return None
    return caches


def _private(path: str, flags: int) -> int:
    # Whoever reads the file reads the prompt.
    return os.open(path, flags, 0o600)


def found(folder: Path, model: str) -> Iterator[tuple[np.ndarray, Entry]]:
    """The files of a model's folder that this version can read, by their headers alone."""
    foreign = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if path.name.endswith(PART):
            continue
        try:
            if _NAME.fullmatch(path.name) is None or not path.is_file():
                raise ValueError("no file of the disk cache")
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
            # save_prompt_cache flattens [metadata, class names, scalars].
            if (metadata.get("0.format"), metadata.get("0.model")) != (FORMAT, model):
                raise ValueError("of another model or version")
            tokens = np.array(list(map(int, metadata["0.tokens"].split())), np.int32)
            entry = Entry(path, metadata["0.trimmable"] == "1", path.stat().st_size)
        except Exception:  # Whatever may lie there.
            foreign.append(path.name)
        else:
            yield tokens, entry
    if foreign:
        logger.warning(
            "%d files in the disk cache %s are damaged or foreign, and ignored: %s, ...",
            len(foreign),
            folder,
            foreign[0],
        )


def listed(folder: Path) -> Iterator[tuple[Path, int]]:
    """All files of any model, and their bytes, the longest unused first."""
    files = []
    for path in folder.glob(f"*/*{SUFFIX}"):
        if _NAME.fullmatch(path.name):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, path, status.st_size))
    yield from ((path, size) for _, path, size in sorted(files))


def make_room(folder: Path, size: int) -> list[Path]:
    """Remove files, the longest unused first, until all take no more than ``size`` bytes.

    Returns:
        Those that were removed.
    """
    files, removed = list(listed(folder)), []
    total = sum(nbytes for _, nbytes in files)
    for path, nbytes in files:
        if total <= size:
            break
        path.unlink(missing_ok=True)
        removed.append(path)
        total -= nbytes
    return removed


def remove_leftovers(folder: Path) -> None:
    """Remove what writers have left that were killed: nobody holds its lock."""
    for path in filter(Path.is_file, folder.glob(f"*/*{PART}")):
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue  # Being written by another server, or gone.


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _checksum_of(path: Path) -> int | None:
    name = _NAME.fullmatch(path.name)
    return int(name[1], 16) if name else None

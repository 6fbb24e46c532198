"""The versions of mlx-lm and mlx that this plugin was checked against."""

import re
from importlib import metadata

# Distribution -> first supported version, first unsupported one. pyproject.toml
# repeats these ranges for installers; a test checks that they agree.
SUPPORTED: dict[str, tuple[str, str]] = {
    "mlx-lm": ("0.32.0", "0.33"),
    "mlx": ("0.32.2", "0.33"),
}


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check() -> str | None:
    """None if the installed versions are supported, else a sentence that says why not."""
    for name, (first, end) in SUPPORTED.items():
        required = f"{name}>={first},<{end}"
        installed = installed_version(name)
        if installed is None:
            return f"{name} is not installed: pip install '{required}'"
        if not _release(first) <= _release(installed) < _release(end):
            return (
                f"{name} {installed} is installed, but this version of "
                f"mlx-turboquant-plugin supports {required}: pip install '{required}', "
                "or another version of mlx-turboquant-plugin"
            )
    return None


def _release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: a pre-release counts as its release."""
    numbers = re.split(r"[^\d.]", version, maxsplit=1)[0].split(".")
    return (*(int(n) for n in numbers if n), 0, 0)[:3]

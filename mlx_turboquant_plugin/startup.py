"""What Python runs at start-up: wait for mlx_lm or mlx_vlm, do nothing else.

The ``.pth`` and ``.start`` files of the wheel call :func:`main` in every Python
process of the environment, so this module must stay cheap: no imports beyond the
modules that the interpreter has loaded anyway.
"""

import os
import sys

TARGET = "mlx_lm"
# mlx_vlm generates without mlx_lm, uncompressed, which is to be said.
AWAITED = (TARGET, "mlx_vlm")


def main() -> None:
    """Have compression switched on when mlx_lm is imported, if ``TURBOQUANT`` is on.

    Safe to call twice. A bad value of ``TURBOQUANT`` is not judged here: it is
    reported when mlx_lm is imported, not in every unrelated Python process.
    """
    if os.environ.get("TURBOQUANT", "") in ("", "0") or TARGET in sys.modules:
        return
    if not waiting():
        sys.meta_path.insert(0, _Finder())


def withdraw() -> None:
    """Stop waiting."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]


def waiting() -> bool:
    """True from :func:`main` until mlx_lm or mlx_vlm is first looked for."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder:
    """Activates the plugin when one of the two is first looked for, then is gone."""

    def find_spec(self, name, path=None, target=None):
        if name not in AWAITED:
            return None
        withdraw()
        _activate()
        # The caller is iterating over the list that has just changed, and would
        # skip a finder: ask the whole list afresh on its behalf.
        from importlib.util import find_spec

        return find_spec(name)


def _activate():
    try:
        from mlx_turboquant_plugin import activation
    except Exception as error:  # a broken installation must not break mlx_lm
        import logging

        logging.getLogger(__package__).error("TurboQuant is off: %s", error)
    else:
        activation.enable_from_environment()

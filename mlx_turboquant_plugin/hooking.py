"""Post-import hooks: functions that are called with modules of mlx-lm once these are imported.

Packages name theirs in entry points of the group ``mlx_turboquant_plugin``: the name is the
module to hook, the value the function. This package's own one is called with ``mlx_lm``, and
adds a hook for each of its modules that there is something to do in.
"""

import sys
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

import wrapt

from . import log, patching

GROUP = "mlx_turboquant_plugin"
# Run by python -m, it is __main__ and never imported under its name.
SERVER = "mlx_lm.server"


class Hook:
    """One entry point, and what became of it.

    Args:
        entry_point: its name is the module to hook, its value the function to call.
    """

    def __init__(self, entry_point: EntryPoint):
        self.module = entry_point.name
        self.function = entry_point.value
        self.outcome = "waiting"
        self._entry_point = entry_point
        self._registered = False

    def arm(self) -> None:
        """Patch the module now if it is loaded, else when it is imported."""
        self.outcome = "waiting"
        module = sys.modules.get(self.module)
        if module is not None:
            self._apply(module)
        elif not self._registered:
            # A registration can't be taken back: it outlives disable().
            self._registered = True
            wrapt.register_post_import_hook(self._imported, self.module)

    def disarm(self) -> None:
        """Do nothing when the module is imported, until armed again."""
        self.outcome = "off"

    def _imported(self, module: ModuleType) -> None:
        self._registered = False
        if patching.active():
            self._apply(module)

    def _apply(self, module: ModuleType) -> None:
        # Whatever goes wrong in here must not break the import of mlx_lm.
        already = len(patching.replaced())
        try:
            self._entry_point.load()(module)
        except Exception as error:
            patching.rollback(already)
            self.outcome = f"failed: {type(error).__name__}: {error}"
            log.logger.error(
                "%s stays as it is: the hook %s failed: %s: %s",
                self.module,
                self.function,
                type(error).__name__,
                error,
            )
            log.logger.debug("the failure in full", exc_info=True)
        else:
            self.outcome = "applied"


_hooks: dict[tuple[str, str], Hook] = {}


def hooks() -> list[Hook]:
    """Every hook that is known, in the order in which they were added."""
    return list(_hooks.values())


def find() -> None:
    """Add the hooks of all installed packages.

    Raises:
        RuntimeError: there are none, not even this package's.
    """
    if _hooks:
        # What is installed while Python runs is for the next time: looking takes long, and
        # comparisons switch on before each step.
        return
    for point in entry_points(group=GROUP):
        _hooks.setdefault((point.name, point.value), Hook(point))
    if not _hooks:
        raise RuntimeError(
            f"no entry points in the group {GROUP}: mlx-turboquant-plugin is not "
            "installed, only on the path; pip install it"
        )


def add(module: str, function: str) -> None:
    """Add a hook, and arm it if patches are active; one that is known stays as it is.

    Args:
        module: the module to hook.
        function: where the function is, as in an entry point: ``package.module:name``.
    """
    if (module, function) not in _hooks:
        hook = _hooks[module, function] = Hook(EntryPoint(module, function, GROUP))
        if patching.active():
            hook.arm()

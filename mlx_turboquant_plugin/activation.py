"""Switch compression on and off: entry points, post-import hooks, patches.

Support for a model is an entry point in the group ``mlx_turboquant_plugin``: its
name is the module to hook, its value a function that is called with that module
once it is imported. Other packages can ship such entry points too.
"""

import sys
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import wrapt

from . import compatibility, log, patching, settings, startup

GROUP = "mlx_turboquant_plugin"


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
_off_because: str | None = None


def enable(**overrides: Any) -> None:
    """Compress the KV caches of models that mlx_lm makes from now on.

    ``TURBOQUANT`` itself need not be set. mlx_lm is not imported by this; it may
    be imported before or after. A second call warns and does nothing.

    Args:
        **overrides: settings by name, as in :class:`settings.Settings`, and
            ``config``; they win over the environment and the settings file.

    Raises:
        SettingsError: a setting is unknown or not allowed here.
        RuntimeError: the installed mlx-lm or mlx can't be used.
    """
    global _off_because
    if patching.active():
        ignored = ", and its arguments are ignored: call disable() first" if overrides else ""
        log.logger.warning("enable() was called again: TurboQuant is on already%s", ignored)
        return
    configuration = settings.load(overrides=overrides)
    problem = compatibility.check()
    if problem:
        raise RuntimeError(problem)
    _check_kernels(configuration)
    _find_hooks()
    _off_because = None
    startup.withdraw()
    settings.put_in_force(configuration)
    log.start(configuration.general.log)
    log.logger.info("TurboQuant is on: %s", configuration.general)
    patching.activate()
    for hook in hooks():
        hook.arm()


def enable_from_environment() -> None:
    """Do what ``TURBOQUANT`` says; log one error and stay off if that can't be done."""
    global _off_because
    try:
        if settings.switched_on():
            enable()
    except Exception as error:
        _off_because = str(error)
        log.logger.error("TurboQuant is off: %s", error)


def disable() -> None:
    """Put mlx_lm's own functions back, and ignore ``TURBOQUANT`` from now on."""
    global _off_because
    startup.withdraw()
    patching.undo()
    for hook in hooks():
        hook.disarm()
    log.stop()
    fused = sys.modules.get(f"{__package__}.attention.fused")
    if fused is not None:
        fused.forget_fallbacks()
    settings.put_in_force(settings.Configuration())
    _off_because = "disable() was called"


def off_because() -> str | None:
    """Why TurboQuant was refused or switched off, or None if neither happened."""
    return _off_because


def hooks() -> list[Hook]:
    """Every hook that was found, in the order of registration."""
    return list(_hooks.values())


def _check_kernels(configuration: settings.Configuration) -> None:
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"mlx can't be imported ({error}): reinstall it; on Linux it needs a "
            "backend, pip install 'mlx-turboquant-plugin[cpu]' or [cuda]"
        ) from error
    from .attention.kernels import kernel_of

    for chosen in configuration.all_settings():
        kernel_of(chosen)


def _find_hooks() -> None:
    if _hooks:
        # What is installed while Python runs is for the next time: looking takes long, and
        # comparisons switch on before each step.
        return
    for entry_point in entry_points(group=GROUP):
        key = (entry_point.name, entry_point.value)
        if key not in _hooks:
            _hooks[key] = Hook(entry_point)
    if not _hooks:
        raise RuntimeError(
            f"no entry points in the group {GROUP}: mlx-turboquant-plugin is not "
            "installed, only on the path; pip install it"
        )

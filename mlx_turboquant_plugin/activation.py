"""Switch compression on and off."""

import sys
from typing import Any

from . import compatibility, hooking, log, patching, settings

# Generates without mlx-lm, uncompressed, and says so once it is imported.
OUTSIDE = "mlx_vlm"
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
    hooking.find()
    _off_because = None
    settings.put_in_force(configuration)
    log.start(configuration.general.log)
    log.logger.info("TurboQuant is on: %s", configuration.general)
    patching.activate()
    hooking.add(OUTSIDE, f"{__package__}.integration.outside:say")
    for hook in hooking.hooks():
        hook.arm()


def enable_from_environment() -> None:
    """Do what ``TURBOQUANT`` says; log one error and stay off if that can't be done.

    Once somebody has called :func:`enable` or :func:`disable` it says nothing more.
    """
    global _off_because
    if patching.active() or _off_because:
        return
    try:
        if settings.switched_on():
            enable()
    except Exception as error:
        _off_because = str(error)
        log.logger.error("TurboQuant is off: %s", error)


def disable() -> None:
    """Put mlx_lm's own functions back, and ignore ``TURBOQUANT`` from now on."""
    global _off_because
    patching.undo()
    for hook in hooking.hooks():
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


def _check_kernels(configuration: settings.Configuration) -> None:
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"mlx can't be imported ({error}): reinstall it; on Linux it needs a "
            "backend, pip install 'mlx-turboquant-plugin[cpu]' or [cuda]"
        ) from error
    from .backends.choice import kernel_of

    for chosen in configuration.all_settings():
        kernel_of(chosen)

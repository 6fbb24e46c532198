"""What is really in force: versions, hooks, patches, settings, caches."""

import os
import platform
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import __version__, activation, hooking, patching, settings, startup
from .compatibility import installed_version

DISTRIBUTION = "mlx-turboquant-plugin"
# What the start-up file does.
START_UP = "from mlx_turboquant_plugin import startup; startup.main()"


@dataclass(frozen=True)
class Status:
    """A snapshot, made by :func:`status`; plain data that JSON can hold.

    Args:
        active: whether mlx_lm is patched, or will be as soon as it is imported.
        reason: why not active; None when active.
        settings_error: what is wrong with the settings, if anything.
        versions: of the plugin, the libraries that it touches and Python.
        device: what mlx computes on; None before mlx is imported.
        kernels: the attention kernels of this machine; None before mlx is imported.
        kernel: what the setting ``kernel`` comes down to here; None if unknown.
        compiler: why functions run uncompiled on the CPU, and what to do; None if they don't.
        fallbacks: what that kernel had to leave to another so far.
        hooks: module, function and outcome of each.
        patched: dotted names of what is replaced in mlx_lm now.
        config: the settings file, if any.
        settings: value and source of each setting; None if they can't be read.
        model_settings: the same for each per-model table.
        models: what became of the models that caches were made for.
    """

    active: bool
    reason: str | None
    settings_error: str | None
    versions: dict[str, str | None]
    device: str | None
    kernels: list[str] | None
    kernel: str | None
    compiler: str | None
    fallbacks: list[str]
    hooks: list[dict[str, str]]
    patched: list[str]
    config: str | None
    settings: dict[str, dict[str, Any]] | None
    model_settings: dict[str, dict[str, dict[str, Any]]]
    models: list[str]

    @property
    def kernel_in_words(self) -> str | None:
        """The kernel, and what keeps it from being what its name says."""
        if self.kernel == "compiled" and self.compiler:
            return f"compiled, but {self.compiler}"
        return self.kernel

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as nested dicts and lists."""
        return asdict(self)


def status() -> Status:
    """Say what is in force in this process, and why. Imports nothing of mlx."""
    error = configuration = None
    try:
        configuration = settings.in_force() if patching.active() else settings.load()
    except settings.SettingsError as bad:
        error = str(bad)
    device = kernels = kernel = compiler = None
    if "mlx.core" in sys.modules:
        from .backends import available_kernels
        from .backends.choice import kernel_of
        from .compiling import uncompiled

        device, kernels, compiler = _device(), available_kernels(), uncompiled()
        try:
            kernel = kernel_of(configuration.general) if configuration else None
        except settings.SettingsError as bad:
            error = str(bad)
    prompt_cache = sys.modules.get(f"{__package__}.integration.prompt_cache")
    fused = sys.modules.get(f"{__package__}.attention.fused")
    return Status(
        active=patching.active(),
        reason=None if patching.active() else _why_off(configuration, error),
        settings_error=error,
        versions=_versions(),
        device=device,
        kernels=kernels,
        kernel=kernel,
        compiler=compiler,
        fallbacks=fused.fallbacks() if fused else [],
        hooks=[
            {"module": h.module, "function": h.function, "outcome": h.outcome}
            for h in hooking.hooks()
        ],
        patched=patching.replaced(),
        config=configuration.config if configuration else None,
        settings=_values(configuration.general) if configuration else None,
        model_settings={
            pattern: _values(model)
            for pattern, model in (configuration.models if configuration else ())
        },
        models=prompt_cache.report() if prompt_cache else [],
    )


def _why_off(configuration: settings.Configuration | None, error: str | None) -> str | None:
    if activation.off_because():
        return activation.off_because()
    if configuration is None:
        return error
    if not configuration.enabled:
        value = os.environ.get(settings.SWITCH)
        state = f"is {value!r}" if value else "is not set"
        return f"{settings.SWITCH} {state}; set {settings.SWITCH}=1 to compress"
    if startup.waiting():
        return f"{startup.TARGET} has not been imported yet"
    missed = "Python did not run the package's start-up file"
    if installed_version(DISTRIBUTION) is None:
        return f"{missed}: install the package with pip (a folder on the path is not enough)"
    customize = Path(__file__).parents[1] / "sitecustomize.py"
    return (
        f"{missed}, for which only site-packages is searched, not the folder of pip install "
        f"--target: echo '{START_UP}' >> {customize}, or call mlx_turboquant_plugin.enable()"
    )


def _versions() -> dict[str, str | None]:
    libraries = {name: installed_version(name) for name in ("mlx-lm", "mlx", "wrapt")}
    return {
        DISTRIBUTION: __version__,
        **libraries,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _device() -> str:
    import mlx.core as mx

    device = mx.default_device()
    name = mx.device_info(device).get("device_name")
    return f"{device} {name}" if name else str(device)


def _values(values: settings.Settings) -> dict[str, dict[str, Any]]:
    return {
        f.name: {"value": getattr(values, f.name), "source": values.source(f.name)}
        for f in fields(values)
        if f.name != "sources"
    }

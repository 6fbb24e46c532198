"""What the user asked for: environment variables, a TOML file and ``enable()``.

Settings come in layers. From weak to strong: the defaults, the file named by
``TURBOQUANT_CONFIG``, the file's first per-model table that matches, the
environment, the arguments of ``enable()``. A preset is expanded in the layer that
names it, below that layer's own keys: ``TURBOQUANT_PRESET=small`` beats a file's
``key_bits``, and ``TURBOQUANT_KEY_BITS`` beats ``TURBOQUANT_PRESET``.

Standard library only: this is read before mlx is.
"""

import difflib
import functools
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .rules import (
    CODEC_BITS,
    MODEL_RULES,
    PRESETS,
    RULES,
    SHAPING,
    Rule,
    SettingsError,
    check,
    each,
    one_of,
)

PREFIX = "TURBOQUANT_"
SWITCH = "TURBOQUANT"
CONFIG = PREFIX + "CONFIG"


@dataclass(frozen=True)
class ModelIdentity:
    """What is known about a model when its cache is made.

    Args:
        type: ``model_type`` of the model's config.
        path: the local folder it was loaded from, if known.
        hub_id: its name on the Hugging Face Hub, if it was loaded by that.
    """

    type: str
    path: str | None = None
    hub_id: str | None = None

    def matches(self, pattern: str) -> bool:
        """True if the glob fits the type, the hub id, the path or the folder's name."""
        names = [self.type, self.path, self.hub_id]
        if self.path:
            names += _spellings(self.path)
        return any(name and fnmatchcase(name, pattern) for name in names)


# Each prompt cache that is made asks, and links are looked up on the disk.
@functools.lru_cache(maxsize=64)
def _spellings(folder: str) -> tuple[str, ...]:
    """The names of a folder, however it was spelled: its path and its own name."""
    paths = Path(folder), Path(folder).resolve()
    return tuple(name for path in paths for name in (str(path), path.name))


@dataclass(frozen=True)
class Settings:
    """The settings in force for one model.

    Args:
        preset: the preset that bits and window started from.
        key_bits: bits per number of the compressed keys: one number, or one for each
            layer of the model. With "lloyd-max", 4 are a mean: see codecs/segmented.py.
        value_bits: the same for the compressed values.
        key_codec: "lloyd-max" or "affine".
        value_codec: "lloyd-max" or "affine".
        window: that many newest tokens, and up to 32 more, stay in full precision.
        sinks: first tokens that stay in full precision.
        balance: weigh key channels by what queries and keys are like before rotating.
        invariant: whether results do not depend on how a prompt is cut into chunks, or
            who shares its batch; slower prompts.
        kernel: how attention reads the codes; "auto" is the best there is.
        bypass: None, "identity" (unquantized vectors instead of codes) or "bridge"
            (codes, but mlx-lm's own attention).
        opt_out: glob patterns of models to leave alone.
        log: level of the plugin's own log on stderr; None leaves logging alone.
        memory_budget: of mlx_lm.server: what the caches of running requests and those that are
            kept may take together, as "6GB" or "40%"; None for no limit.
        disk_cache: of mlx_lm.server: the folder, maybe followed by ":SIZE", that keeps prompt
            caches that memory has no room for; None for none.
        sources: where each value came from; not part of equality.

    Raises:
        SettingsError: a value is out of range, or bits and codec don't go together.
    """

    preset: str = "default"
    key_bits: int | tuple[int, ...] = PRESETS["default"]["key_bits"]
    value_bits: int | tuple[int, ...] = PRESETS["default"]["value_bits"]
    key_codec: str = "lloyd-max"
    value_codec: str = "lloyd-max"
    window: int = PRESETS["default"]["window"]
    sinks: int = 4
    balance: bool = True
    invariant: bool = False
    kernel: str = "auto"
    bypass: str | None = None
    opt_out: tuple[str, ...] = ()
    log: str | None = None
    memory_budget: str | None = None
    disk_cache: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name in RULES:
            check(name, getattr(self, name), f"{name} ({self.source(name)})")
        for side in ("key", "value"):
            bits, codec = f"{side}_bits", f"{side}_codec"
            allowed = CODEC_BITS[getattr(self, codec)]
            if not set(each(getattr(self, bits))) <= set(allowed):
                raise SettingsError(
                    f"{bits} = {getattr(self, bits)} ({self.source(bits)}) does not go "
                    f"with {codec} = {getattr(self, codec)!r} ({self.source(codec)}), "
                    f"which allows {one_of(allowed)}: change one of the two"
                )

    def source(self, name: str) -> str:
        """Where the value of a setting came from, in words."""
        return self.sources.get(name, "default")

    @property
    def shaping(self) -> dict[str, Any]:
        """What is kept of keys and values: the settings in ``SHAPING`` by name."""
        return {name: getattr(self, name) for name in SHAPING}

    def shaped_by(self, unlike: Mapping[str, Any] | None = None) -> str:
        """Which of these, or which preset, the environment and a file set, and to what.

        As in "key_bits 4,4,3, sinks 64 (environment)"; empty if they set none. What comes to the
        same as in ``unlike``, a preset and all that shapes, is left out.
        """
        found: dict[str, list[str]] = {}
        for name in ("preset", *SHAPING):
            if unlike and unlike[name] == getattr(self, name):
                continue
            origin = self.source(name).partition(f" {PREFIX}")[0]
            if origin.startswith(("environment", "file ")):
                found.setdefault(origin, []).append(f"{name} {_in_words(getattr(self, name))}")
        return ", ".join(f"{', '.join(names)} ({origin})" for origin, names in found.items())

    def for_layers(self, count: int) -> list["Settings"]:
        """The settings of each layer of a model with ``count`` layers: bits are one number.

        Raises:
            SettingsError: bits are given by layer, but for another number of layers.
        """
        if not isinstance(self.key_bits, tuple) and not isinstance(self.value_bits, tuple):
            return [self] * count
        columns = {}
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            columns[name] = bits if isinstance(bits, tuple) else (bits,) * count
            if len(columns[name]) != count:
                raise SettingsError(
                    f"{name} ({self.source(name)}) has {len(bits)} numbers, and the model has "
                    f"{count} layers: give one number for all layers, or one for each"
                )
        return [
            replace(self, key_bits=k, value_bits=v) for k, v in zip(*columns.values(), strict=True)
        ]

    def opted_out(self, identity: ModelIdentity) -> str | None:
        """The first ``opt_out`` pattern that matches the model, or None."""
        return next((p for p in self.opt_out if identity.matches(p)), None)


def _in_words(value: Any) -> str:
    """A value as a variable of the environment would have it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "1", False: "0"}[value]
    return ",".join(map(str, each(value)))


@dataclass(frozen=True)
class Configuration:
    """Everything that was asked for, checked.

    Args:
        enabled: whether ``TURBOQUANT`` is 1.
        general: the settings of a model that no per-model table matches.
        models: pattern and settings of each per-model table, in the file's order.
        config: the TOML file that was read, if any.
    """

    enabled: bool = False
    general: Settings = field(default_factory=Settings)
    models: tuple[tuple[str, Settings], ...] = ()
    config: str | None = None

    def for_model(self, identity: ModelIdentity) -> Settings:
        """The settings of one model: the first per-model table that matches decides."""
        for pattern, settings in self.models:
            if identity.matches(pattern):
                return settings
        return self.general

    def all_settings(self) -> list[Settings]:
        """The general settings, then those of each per-model table."""
        return [self.general, *(settings for _, settings in self.models)]


def load(
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Configuration:
    """Read and check every layer.

    Args:
        environ: the environment variables; ``os.environ`` by default. An empty
            variable counts as unset.
        overrides: the strongest layer: names as in :class:`Settings`, and ``config``.

    Raises:
        SettingsError: a name is unknown, a value is not allowed, or the TOML file
            can't be read; also where a stronger layer would hide the mistake.
    """
    environ = os.environ if environ is None else environ
    overrides = dict(overrides or {})
    path = overrides.pop("config", None) or environ.get(CONFIG)
    strong = [_environment(environ), _table(overrides, "enable()", RULES)]
    general, models = _file(path) if path else ({}, [])
    return Configuration(
        enabled=switched_on(environ),
        general=_merge([general, *strong]),
        models=tuple((p, _merge([general, layer, *strong])) for p, layer in models),
        config=str(path) if path else None,
    )


def of_preset(name: str) -> Settings:
    """The settings of a preset alone, whatever the environment and the file say."""
    return _merge([{"preset": (name, "preset")}])


def switched_on(environ: Mapping[str, str] | None = None) -> bool:
    """True if ``TURBOQUANT`` is 1, False if it is 0, empty or unset.

    Raises:
        SettingsError: it is anything else.
    """
    value = (os.environ if environ is None else environ).get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise SettingsError(
            f"environment {SWITCH} is {value!r}; allowed is 1 (on) or 0 (off): "
            "set one of these or unset it"
        )
    return value == "1"


# Name -> (value, source): what one source sets.
_Layer = dict[str, tuple[Any, str]]


def _unknown(name: str, where: str, known: Iterable[str]) -> SettingsError:
    # Without the prefix, which would make any two variables look alike.
    short = {k.upper().removeprefix(PREFIX): k for k in known}
    close = difflib.get_close_matches(name.upper().removeprefix(PREFIX), short, n=1)
    advice = (
        f"did you mean {short[close[0]]}? Rename or remove it"
        if close
        else f"known are {', '.join(short.values())}; remove it"
    )
    return SettingsError(f"unknown setting {name} in {where}: {advice}")


def _environment(environ: Mapping[str, str]) -> _Layer:
    names = {PREFIX + name.upper(): name for name in RULES}
    layer: _Layer = {}
    # In lower case they would be ignored without a word.
    for variable in sorted(v for v in environ if f"{v.upper()}_".startswith(PREFIX)):
        if variable in (SWITCH, CONFIG):
            continue
        if variable not in names:
            raise _unknown(variable, "the environment", [SWITCH, CONFIG, *names])
        name, text = names[variable], environ[variable].strip()
        if not text:
            continue
        source = f"environment {variable}"
        try:
            value = RULES[name].from_text(text)
        except ValueError:
            value = text  # not a number: the check below says what is allowed
        check(name, value, source, from_text=True)
        layer[name] = (value, source)
    return layer


def _table(table: Mapping[str, Any], source: str, rules: Mapping[str, Rule]) -> _Layer:
    layer: _Layer = {}
    for name, value in table.items():
        if name not in rules:
            raise _unknown(name, source, rules)
        value = tuple(value) if isinstance(value, list) else value
        check(name, value, f"{name} in {source}")
        layer[name] = (value, source)
    return layer


def _file(path: str) -> tuple[_Layer, list[tuple[str, _Layer]]]:
    """Read a TOML file into its general layer and its per-model layers."""
    try:
        document = tomllib.loads(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise SettingsError(
            f"the settings file {path} can't be read ({error.strerror}): correct the path, or "
            f"unset {CONFIG}"
        ) from error
    except ValueError as error:
        raise SettingsError(
            f"the settings file {path} is not TOML in UTF-8 ({error}): correct it, or unset "
            f"{CONFIG}"
        ) from error
    found = [
        (header, dict(parent["turboquant"]))
        for header, parent in (
            ("turboquant", document),
            ("tool.turboquant", document.get("tool")),
        )
        if isinstance(parent, dict) and isinstance(parent.get("turboquant"), dict)
    ]
    if len(found) != 1:
        raise SettingsError(
            f"the settings file {path} has {len(found)} of the tables [turboquant] "
            f"and [tool.turboquant]: write exactly one, or unset {CONFIG}"
        )
    [(header, general)] = found
    models = general.pop("models", {})
    source = f"file {path} [{header}]"
    if not isinstance(models, dict):
        raise SettingsError(
            f"models in {source} is {models!r}; allowed are tables: write "
            f'[{header}.models."PATTERN"]'
        )
    layers = []
    for pattern, table in models.items():
        model_source = f'file {path} [{header}.models."{pattern}"]'
        if not isinstance(table, dict):
            raise SettingsError(
                f"{model_source} is {table!r}; allowed is a table of settings: "
                "write one or remove it"
            )
        layers.append((pattern, _table(table, model_source, MODEL_RULES)))
    return _table(general, source, RULES), layers


def _merge(layers: Iterable[_Layer]) -> Settings:
    """Stack layers, weakest first."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        if "preset" in layer:
            preset, _ = layer["preset"]
            values.update(PRESETS[preset])
            sources.update(dict.fromkeys(PRESETS[preset], f"preset {preset}"))
        values.update((name, value) for name, (value, _) in layer.items())
        sources.update((name, source) for name, (_, source) in layer.items())
    return Settings(**values, sources=sources)


_in_force = Configuration()


def in_force() -> Configuration:
    """The configuration that the patches follow."""
    return _in_force


def put_in_force(configuration: Configuration) -> None:
    """Let the patches follow ``configuration``."""
    global _in_force
    _in_force = configuration

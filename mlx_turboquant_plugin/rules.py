"""What each setting may be, and how it is written in the environment."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Every preset sets the same keys, so that naming one undoes another.
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"key_bits": 4, "value_bits": 4, "window": 512},
    "default": {"key_bits": 4, "value_bits": 4, "window": 160},
    "small": {"key_bits": 4, "value_bits": 3, "window": 128},
}
CODEC_BITS = {"lloyd-max": (2, 3, 4), "affine": (2, 3, 4, 8)}
KERNELS = ("auto", "eager", "compiled", "metal", "cuda")
BYPASSES = ("identity", "bridge")
# As mlx-lm counts, decimal, and binary ones.
UNITS = {"": 1, "B": 1} | {
    f"{prefix}{letter}": base**power
    for base, letter in ((1000, "B"), (1024, "IB"))
    for power, prefix in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?((?:[KMGT]I?)?B|)", re.IGNORECASE | re.ASCII)
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class SettingsError(ValueError):
    """A setting that can't be used; the message says which, why and what to do."""


class Rule(NamedTuple):
    """What one setting may be, and how to read it from an environment variable.

    Attributes:
        allowed: in words; ``allowed_text`` if these are others in the environment.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    from_text: Callable[[str], Any] = str
    allowed_text: str | None = None


def one_of(allowed: Iterable) -> str:
    """The values in words."""
    *most, last = ("none" if value is None else str(value) for value in allowed)
    return f"{', '.join(most)} or {last}" if most else last


def _choice(*allowed: Any, from_text: Callable[[str], Any] = str) -> Rule:
    # The type is compared too: to Python True is 1 and 4.0 is 4.
    return Rule(
        one_of(allowed),
        lambda value: any(value == a and type(value) is type(a) for a in allowed),
        from_text,
    )


def _integer(low: int, high: int, step: int = 1) -> Rule:
    kind = "a whole number" if step == 1 else f"a multiple of {step}"
    return Rule(
        f"{kind} from {low} to {high}",
        lambda value: type(value) is int and value in range(low, high + 1, step),
        int,
    )


def each(bits: int | tuple[int, ...]) -> tuple[int, ...]:
    """The bits of each layer, or the one number that all layers have."""
    return bits if isinstance(bits, tuple) else (bits,)


def _bits() -> Rule:
    allowed = sorted(set().union(*CODEC_BITS.values()))
    extra = set(allowed) - set(CODEC_BITS["lloyd-max"])
    codecs = one_of(name for name, bits in CODEC_BITS.items() if extra & set(bits))
    numbers = f"{one_of(allowed)} ({', '.join(map(str, extra))} with {codecs} only)"
    return Rule(
        f"{numbers}, or a list of these with one for each layer",
        lambda value: value != () and all(type(b) is int and b in allowed for b in each(value)),
        lambda text: tuple(map(int, text.split(","))) if "," in text else int(text),
        f"{numbers}, or one of these for each layer, separated by commas",
    )


# Of caches, in bytes: less is a forgotten unit.
LEAST_SIZE = 1000


def size_of(text: str) -> int:
    """The bytes of a size such as 6GB, 500MiB or 1000000.

    Raises:
        ValueError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size < LEAST_SIZE:
        raise ValueError(
            f"{text!r} is not a size of at least {LEAST_SIZE} bytes, such as 6GB, 500MiB or 1000000"
        )
    return size


def share_of(text: str) -> float | None:
    """The share that a percentage such as 40% is of a whole, or None if it is none up to 100%."""
    found = _SHARE.fullmatch(text)
    share = float(found[1]) / 100 if found else 0
    return share if 0 < share <= 1 else None


def folder_and_size(text: str, default: int) -> tuple[str, int]:
    """The folder and the bytes of DIR:SIZE, or of DIR alone.

    Raises:
        ValueError: there is no folder, or what follows its last colon is a number but no size.
    """
    folder, colon, size = text.rpartition(":")
    if not colon or not size[:1].isdigit():
        folder, found = text, default
    else:
        found = size_of(size)
    if not folder:
        raise ValueError(f"{text!r} names no folder")
    return folder, found


def _is_budget(value: Any) -> bool:
    return value is None or (
        isinstance(value, str) and (share_of(value) is not None or _holds(size_of, value))
    )


def _is_folder(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _holds(folder_and_size, value, 1))


def _holds(read: Callable, *arguments: Any) -> bool:
    try:
        read(*arguments)
    except ValueError:
        return False
    return True


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(p.strip() for p in text.split(",") if p.strip())


def _text_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _level_or_none(text: str) -> str | None:
    return text.upper() if text.upper() in LOG_LEVELS else _text_or_none(text)


_SWITCH = Rule(
    "true or false",
    lambda value: isinstance(value, bool),
    lambda text: {"1": True, "0": False}.get(text, text),
    "1 or 0",
)
RULES: dict[str, Rule] = {
    "preset": _choice(*PRESETS),
    "key_bits": _bits(),
    "value_bits": _bits(),
    "key_codec": _choice(*CODEC_BITS),
    "value_codec": _choice(*CODEC_BITS),
    "window": _integer(32, 4096, step=32),
    "sinks": _integer(0, 64),
    "balance": _SWITCH,
    "invariant": _SWITCH,
    "kernel": _choice(*KERNELS),
    "bypass": _choice(None, *BYPASSES, from_text=_text_or_none),
    "opt_out": Rule(
        "a list of glob patterns",
        lambda value: isinstance(value, tuple) and all(isinstance(p, str) and p for p in value),
        _patterns,
        "glob patterns, separated by commas",
    ),
    "log": _choice(None, *LOG_LEVELS, from_text=_level_or_none),
    "memory_budget": Rule(
        "a size such as 6GB or 500MiB, a share of the memory such as 40%, or none",
        _is_budget,
        _text_or_none,
    ),
    "disk_cache": Rule(
        "a folder, followed by :SIZE for another size than 10GB, or none",
        _is_folder,
        _text_or_none,
    ),
}
# What is kept of keys and values; the others say by whom, where and how fast.
SHAPING = (
    "key_bits", "value_bits", "key_codec", "value_codec", "window", "sinks", "balance", "bypass",
)  # fmt: skip
# A process has one log and one memory, and a table that names a model needs no second pattern.
NOT_OF_MODELS = "opt_out", "log", "memory_budget", "disk_cache"
MODEL_RULES = {n: rule for n, rule in RULES.items() if n not in NOT_OF_MODELS}


def check(name: str, value: Any, where: str, from_text: bool = False) -> None:
    """Raise SettingsError, which says ``where``, if a setting can't have this value."""
    rule = RULES[name]
    if not rule.accepts(value):
        allowed = (from_text and rule.allowed_text) or rule.allowed
        raise SettingsError(f"{where} is {value!r}; allowed is {allowed}: change or remove it")

"""``mlx_turboquant estimate``: what a model's caches will take, and how much fits into a memory.

Everything is counted from the configuration: nothing is run, and no weight is read.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import compiling, log
from ..activation import disable
from ..cache import CompressedKVCache
from ..cache.parts import only_compressed
from ..codecs.key_bias import BLOCK
from ..integration.calibration import assume
from ..integration.calibration_file import Statistics
from ..integration.family import attention_of, family_of, layers_of
from ..integration.layer import known_layer
from ..integration.sizes import Sizes
from ..reporting import status
from ..rules import size_of
from .arms import PRESET_ARMS, Arm, configured
from .loading import context
from .runs import compressed, prompt_cache, table_bytes
from .tables import Column, table
from .weightless import model_of, weight_bytes

LENGTHS = (8192, 32768, 131072)
# Of a chat; how many of them fit is shown.
CHAT = LENGTHS[0]
# Between these two everything that does not grow is there, and steps of allocation are over.
FAR = (2**20, 2**20 + 2**16)
# Who can hold so many tokens keeps them in a window or a state.
ENDLESS = 2**30


@dataclass(frozen=True)
class Estimate:
    """What one way to keep keys and values takes, in bytes.

    Attributes:
        name: what the table calls it.
        at: of one sequence of so many tokens, everything that grows with sequences.
        shared: tables and statistics that all sequences share.
        room: what the weights leave of the memory.
    """

    name: str
    at: Callable[[int], int]
    shared: int
    room: int

    @property
    def per_token(self) -> float:
        """Of each token more, far from the beginning."""
        near, far = FAR
        return (self.at(far) - self.at(near)) / (far - near)

    @property
    def fixed(self) -> int:
        """What does not grow: sinks, windows, states, tables."""
        return round(self.at(FAR[0]) - self.per_token * FAR[0]) + self.shared

    @property
    def longest(self) -> int:
        """The most tokens of one sequence that fit, up to ENDLESS."""
        low, high = 0, ENDLESS
        while low < high:
            middle = (low + high + 1) // 2
            if self.at(middle) + self.shared <= self.room:
                low = middle
            else:
                high = middle - 1
        return low

    @property
    def chats(self) -> int:
        """How many sequences of CHAT tokens fit."""
        return max(0, self.room - self.shared) // self.at(CHAT)


def size(text: str) -> int:
    """An argparse type: the bytes of a size; see :func:`~..rules.size_of`."""
    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder of a model; config.json will do"
    )
    parser.add_argument(
        "--memory",
        required=True,
        type=size,
        metavar="SIZE",
        help="what weights and caches may take together, such as 16GB",
    )


def run(args: argparse.Namespace) -> int:
    """Count, and print a table.

    Returns:
        0; what is wrong with the arguments is raised as SettingsError.
    """
    disable()  # TURBOQUANT=1 would compress the exact caches too
    compiling.here()
    model, config, there = model_of(args.model)
    weights = weight_bytes(args.model, model, there)
    presets = list(PRESET_ARMS.values())
    own = configured(model, presets)
    arms = [*presets, own[0]] if own else presets
    estimates, outcome = estimate(model, args.memory - weights, arms)
    if own:
        outcome += f"\n{own[0].name}: {own[1]}"
    sys.stdout.write("\n".join(_lines(args, config, weights, there, estimates, outcome)) + "\n")
    return 0


def estimate(
    model: nn.Module, room: int, arms: Iterable[Arm] = PRESET_ARMS.values()
) -> tuple[list[Estimate], str]:
    """Uncompressed caches, those of each arm, and what becomes of the model in words.

    Args:
        room: the bytes for caches.
    """
    exact = prompt_cache(model)
    sizes = Sizes(model, exact)
    found = [Estimate("uncompressed", functools.partial(sizes.at, exact), 0, room)]
    outcome = ""
    for arm in arms:
        with compressed(**(arm.settings or {})), log.unheard():
            caches = prompt_cache(model)
            if arm.name == "default":
                outcome = status().models[-1]
            statistics, ours = _learn(model, caches)
        if ours:
            shared = table_bytes(ours) + statistics
            found.append(Estimate(arm.name, functools.partial(sizes.at, caches), shared, room))
    return found, outcome


def _learn(model: nn.Module, caches: Sequence[Any]) -> tuple[int, list[CompressedKVCache]]:
    """Give codecs tables like those that they will have.

    Returns:
        The bytes of the statistics that these are made of, and the compressed caches.
    """
    taken, ours = 0, []
    for layer, cache in zip(layers_of(model), caches):
        attention = attention_of(layer)[0]
        for one in only_compressed([cache]):
            ours.append(one)
            codec: Any = one.codec
            statistics = _statistics(attention, codec.spec.head_dim)
            if statistics is not None:
                assume(attention, statistics)
                codec.learn()
                taken += sum(x.nbytes for x in statistics if x is not None)
            if codec.informed and codec.bias:
                codec.bias.table.reach(LENGTHS[-1] // BLOCK)
    return taken, ours


def _statistics(attention: nn.Module, head_dim: int) -> Statistics | None:
    """Some of the shapes that calibration will find; None if it leaves the codec to the weights."""
    family = family_of(attention)
    heads, kv_heads = family.head_counts(attention)
    keys, queries, mean = mx.ones((kv_heads, head_dim)), mx.ones((heads, head_dim)), None
    if not family.dims:
        try:
            mean = known_layer(attention).key_bias(keys).bias
        except ValueError:
            # No mean is the same for all positions.
            return None
    return Statistics(mean, keys, queries)


def _lines(
    args: argparse.Namespace,
    config: dict[str, Any],
    weights: int,
    there: bool,
    estimates: list[Estimate],
    outcome: str,
) -> Iterator[str]:
    """The report for a terminal."""
    source = "as they are in the folder" if there else "as config.json describes them"
    yield f"{args.model}: weights {_amount(weights)}, {source}"
    if context(config):
        yield f"the model is made for {context(config)} tokens"
    yield outcome
    yield (
        "KV cache of all layers and of one sequence, in bytes as mlx-lm counts them; fixed: sinks, "
        "windows, states and tables"
    )
    yield ""
    columns: list[Column] = [
        Column("", "<", lambda e: e.name),
        Column("per token", ">", lambda e: _amount(e.per_token)),
        Column("fixed", ">", lambda e: _amount(e.fixed)),
        *(Column(f"{n} tokens", ">", functools.partial(_at, estimates[0], n)) for n in LENGTHS),
        Column("longest", ">", lambda e: e.longest if e.longest < ENDLESS else "any"),
        Column(f"chats of {CHAT}", ">", lambda e: e.chats),
    ]
    yield from table(columns, estimates)
    yield ""
    room = args.memory - weights
    if room < 0:
        yield f"the weights alone are larger than {_amount(args.memory)}"
    else:
        yield (
            f"longest, chats: what fits into {_amount(room)}, which the weights leave of "
            f"{_amount(args.memory)}; activations and other programs need room, too"
        )


def _at(exact: Estimate, count: int, one: Estimate) -> str:
    taken, whole = one.at(count) + one.shared, exact.at(count)
    return _amount(taken) if one is exact else f"{_amount(taken)} ({whole / taken:.2f}x)"


def _amount(count: float) -> str:
    """Bytes in words; units are decimal, as in mlx-lm."""
    for unit, whole in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= whole:
            figure = count / whole
            return f"{figure:.{2 if figure < 10 else 1 if figure < 100 else 0}f} {unit}"
    return f"{count:.0f} bytes"

"""The backend that leaves everything to MLX's operations."""

from contextlib import nullcontext

import mlx.core as mx

from ..codecs.kv_codec import ALL, Codes, KVCodec
from ..streams import helpers
from . import support
from .problem import Problem
from .tokens import Pair, Pass, Places, Plan, Tokens


class MLXOps:
    """Attention in tiles, eagerly or compiled; see attention/tiles.py."""

    fixed_shapes = False
    max_queries = 0
    dequantizes = False

    def __init__(self, name: str, compiled: bool = False):
        self.name, self.compiled = name, compiled

    def runs_here(self) -> bool:
        return True

    def encode(
        self,
        codec: KVCodec,
        keys: mx.array,
        values: mx.array,
        start: int,
        older: tuple[Codes, Codes] = ((), ()),
        part: slice = ALL,
    ) -> tuple[Codes, Codes]:
        """As :meth:`KVCodec.encode`, on a stream of its own where a core is free for it.

        In decoding nothing waits for the codes of old tokens but the layer's own attention.
        """
        streams = () if support.on_gpu() else helpers()
        with mx.stream(streams[0]) if streams else nullcontext():
            return codec.encode(keys, values, start, older, part)

    def unsupported(self, problem: Problem) -> str | None:
        return "attention without MLX's operations"

    def attend(self, problem: Problem) -> mx.array:
        raise NotImplementedError(self.unsupported(problem))

    def lays_out(self, codec: KVCodec, tokens: Tokens) -> bool:
        return False

    def lay_out(self, codec: KVCodec, tokens: Tokens, places: Places) -> tuple[Pair, Pair]:
        raise NotImplementedError("tokens are laid out by MLX's operations")

    def passes(self, codec: KVCodec, keys: mx.array, values: mx.array) -> bool:
        return False

    def run_pass(self, codec: KVCodec, tokens: Tokens, plan: Plan) -> Pass:
        raise NotImplementedError("a pass is made of MLX's operations")

"""What the backends with kernels of their own have in common."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..codecs.kv_codec import Codes, KVCodec
from .dequantize import lay_out
from .problem import Problem
from .prompt import run_pass
from .support import cannot_lay_out, encodes, on_gpu, unsupported
from .tokens import Pair, Pass, Places, Plan, Tokens

# Speculative decoding verifies a few tokens at once; more are better served otherwise.
MAX_QUERIES = 8


class Fused:
    """Codes are dequantized in registers, never in memory; but for prompts, layer by layer.

    Attributes:
        kernel: makes a kernel that is written in Metal, of the name of its file, its inputs and
            its outputs.
    """

    name: str
    attend: Callable[[Problem], mx.array]
    encode: Callable[..., tuple[Codes, Codes]]
    kernel: Callable[[str, str, str], Any]
    # What kernels leave to others is for the compiled functions.
    compiled = True
    fixed_shapes = False
    max_queries = MAX_QUERIES
    dequantizes = False
    unsupported = staticmethod(unsupported)

    def runs_here(self) -> bool:
        return on_gpu() and bool(getattr(mx, self.name).is_available())

    def lays_out(self, codec: KVCodec, tokens: Tokens) -> bool:
        return cannot_lay_out(codec, tokens) is None

    def lay_out(self, codec: KVCodec, tokens: Tokens, places: Places) -> tuple[Pair, Pair]:
        return lay_out(self.kernel, codec, tokens, places)

    def passes(self, codec: KVCodec, keys: mx.array, values: mx.array) -> bool:
        spec = codec.spec
        return encodes(spec.key_codec, keys) and encodes(spec.value_codec, values)

    def run_pass(self, codec: KVCodec, tokens: Tokens, plan: Plan) -> Pass:
        return run_pass(self, codec, tokens, plan)

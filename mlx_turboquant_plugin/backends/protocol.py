"""What a cache and its attention ask of a backend."""

from typing import Protocol

import mlx.core as mx

from ..codecs.kv_codec import ALL, Codes, KVCodec
from .problem import Problem
from .tokens import Pair, Pass, Places, Plan, Tokens


class Backend(Protocol):
    """Makes codes and attends over them; chosen once for a cache, and shared by all.

    Attributes:
        name: the value of the setting ``kernel``.
        compiled: whether attention that it leaves to MLX's operations runs under ``mx.compile``.
        fixed_shapes: whether launches are faster while arrays keep their shapes: caches hold as
            many full-precision tokens as can be needed then, and one goes when one comes.
        max_queries: the most queries of a pass that :meth:`attend` serves; 0 if it serves none.
        dequantizes: whether attention that :meth:`attend` does not serve is that of MLX's own
            fused function over dequantized tokens on every device, not on GPUs alone.
    """

    name: str
    compiled: bool
    fixed_shapes: bool
    max_queries: int
    dequantizes: bool

    def runs_here(self) -> bool:
        """Whether it can run on the default device."""

    def encode(
        self,
        codec: KVCodec,
        keys: mx.array,
        values: mx.array,
        start: int,
        older: tuple[Codes, Codes] = ((), ()),
        part: slice = ALL,
    ) -> tuple[Codes, Codes]:
        """As :meth:`KVCodec.encode`."""

    def unsupported(self, problem: Problem) -> str | None:
        """None, or in words what :meth:`attend` can't do about ``problem``."""

    def attend(self, problem: Problem) -> mx.array:
        """The attention (B, H_q, N, D_v) of a supported problem, in the dtype of its queries."""

    def lays_out(self, codec: KVCodec, tokens: Tokens) -> bool:
        """Whether :meth:`lay_out` can be asked about ``tokens``."""

    def lay_out(self, codec: KVCodec, tokens: Tokens, places: Places) -> tuple[Pair, Pair]:
        """See :func:`~.dequantize.lay_out`."""

    def passes(self, codec: KVCodec, keys: mx.array, values: mx.array) -> bool:
        """Whether :meth:`run_pass` can be asked about keys and values (B, H, N, D)."""

    def run_pass(self, codec: KVCodec, tokens: Tokens, plan: Plan) -> Pass:
        """What a pass over part of a prompt does to one layer's cache, see :class:`Plan`."""

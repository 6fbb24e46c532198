"""What a pass over part of a prompt does to one layer's cache, described once for all layers.

Describing launches to MLX takes longer than running them, and all layers launch the same:
each pass is traced by ``mx.compile`` for the first layer and repeated for the others.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from ..codecs.key_bias import RotaryTable
from ..codecs.kv_codec import CodecSpec, KVCodec
from ..per_thread import cached_per_thread
from .tokens import Pass, Plan, Tokens

if TYPE_CHECKING:
    from .fused import Fused


class _Bias(NamedTuple):
    """A layer's key bias as :func:`model_arrays` reads it."""

    bias: mx.array
    table: RotaryTable


def run_pass(backend: "Fused", codec: KVCodec, tokens: Tokens, plan: Plan) -> Pass:
    """Dequantize, encode and drop, for one layer.

    Args:
        backend: a fused one.
        tokens: those of the pass are the newer ones.
    """
    bias, newer = codec.bias, tokens.newer
    assert newer is not None, "a pass has tokens"
    run = _traced(
        backend,
        codec.spec,
        codec.balance is not None,
        codec.layout is not None,
        codec.feedback is not None,
        bias and bias.table,
        tokens.older and tokens.older[0].shape[2],
        tuple(newer[0].shape),
        newer[0].dtype,
        newer[1].dtype,
        tokens.key_codes[-1].shape[-1] if tokens.key_codes else 0,
        tokens.first_quantized,
        plan,
    )
    parts = codec.balance, codec.layout, codec.feedback, bias.bias if bias else None
    known = [x for x in parts if x is not None]
    return Pass(*run(tokens.older or (), newer, tokens.key_codes, tokens.value_codes, known))


# Prompts have passes of a few kinds, and other prompts the same. MLX keeps traces by thread.
@cached_per_thread(maxsize=64)
def _traced(
    backend: "Fused",
    spec: CodecSpec,
    balanced: bool,
    ordered: bool,
    fed_back: bool,
    table: RotaryTable | None,
    older_count: int | None,
    shape: tuple[int, ...],
    key_dtype: mx.Dtype,
    value_dtype: mx.Dtype,
    quantized: int,
    first_quantized: int,
    plan: Plan,
) -> Callable:
    """:func:`run_pass` for one kind of layer.

    Args:
        balanced, ordered, fed_back, table: whether keys are balanced and sorted and their errors
            fed back, and the rotary table of a bias.
        older_count, shape, key_dtype, value_dtype, quantized: of the arrays that it is given.
    """
    part = slice(plan.encoded.start, plan.encoded.stop)

    def run(older, newer, key_codes, value_codes, known):
        arrays = iter(known)
        balance, layout, feedback = (
            next(arrays) if is_there else None for is_there in (balanced, ordered, fed_back)
        )
        bias: Any = table and _Bias(next(arrays), table)
        codec = KVCodec(spec, balance, bias, layout)
        # Given, since what it is made of has no values here.
        codec.feedback = feedback
        tokens = Tokens(older or None, newer, key_codes, value_codes, first_quantized)
        (keys, values), kept = backend.lay_out(codec, tokens, plan.places)
        codes = backend.encode(codec, keys, values, plan.start, (key_codes, value_codes), part)
        return (keys, values), kept, *codes

    return mx.compile(run)

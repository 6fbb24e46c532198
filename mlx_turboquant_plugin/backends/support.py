"""What the fused kernels can do."""

import functools
import itertools

import mlx.core as mx

from ..codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec
from .problem import Problem
from .tokens import Tokens

CODECS = (SEGMENTED, "lloyd-max", "affine")
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def unsupported(problem: Problem) -> str | None:
    """None, or what fused kernels can't do about ``problem``, in words."""
    return _unsupported(problem.codec.spec, problem.queries.dtype, *problem.exact_tokens.dtypes)


@functools.cache
def _unsupported(
    spec: CodecSpec, queries: mx.Dtype, keys: mx.Dtype, values: mx.Dtype
) -> str | None:
    sides = (spec.key_codec, spec.head_dim), (spec.value_codec, spec.value_dim)
    for problem in itertools.starmap(unsupported_vectors, sides):
        if problem:
            return problem
    for dtype in (queries, keys, values):
        if dtype not in DTYPES:
            return f"{dtype}: queries, keys and values must be float16, bfloat16 or float32"
    if keys != values:
        return f"keys of {keys} and values of {values}: they must be of one type"
    return None


def encodes(codec: str, x: mx.array) -> bool:
    """Whether the fused kernels make the codes of vectors ``x`` (B, H, T, D) themselves."""
    supported = not unsupported_vectors(codec, x.shape[-1]) and x.dtype in DTYPES
    return codec != "affine" and supported


def unsupported_vectors(codec: str, dim: int) -> str | None:
    """None, or in words why the fused kernels can't have codes of vectors of this dimension."""
    if codec not in CODECS:
        return f"the {codec} codec"
    factor = 16 if codec == SEGMENTED else 8
    if dim % factor != 0 or not 32 <= dim <= 256:
        return f"a head dim of {dim}: it must be a multiple of {factor} from 32 to 256"
    return None


def cannot_lay_out(codec: KVCodec, tokens: Tokens) -> str | None:
    """None, or what the kernel can't do about ``tokens``, in words."""
    for name, x in zip((codec.spec.key_codec, codec.spec.value_codec), tokens.some):
        problem = unsupported_vectors(name, x.shape[-1])
        if problem:
            return problem
        if x.dtype not in DTYPES:
            return f"{x.dtype}: keys and values must be float16, bfloat16 or float32"
    return None

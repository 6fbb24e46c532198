"""What the fused kernels can do."""

import functools

import mlx.core as mx

from ..codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec
from .problem import Problem
from .tokens import Tokens

CODECS = (SEGMENTED, "lloyd-max", "affine")
DTYPES = (mx.float16, mx.bfloat16, mx.float32)

# The largest head dim that queries are multiplied with codes of, and that of latents and of some
# full layers, which there are kernels to make and to dequantize codes of.
MOST_ATTENDED, WIDE = 256, 512


def on_gpu() -> bool:
    """Whether MLX's default device is one."""
    return mx.default_device().type == mx.gpu


def unsupported(problem: Problem) -> str | None:
    """None, or what fused kernels can't do about ``problem``, in words."""
    return _unsupported(problem.codec.spec, problem.queries.dtype, *problem.full_tokens.dtypes)


@functools.cache
def _unsupported(
    spec: CodecSpec, queries: mx.Dtype, keys: mx.Dtype, values: mx.Dtype
) -> str | None:
    sides = (spec.key_codec, spec.head_dim), (spec.value_codec, spec.value_dim)
    for codec, dim in sides:
        if dim > MOST_ATTENDED:
            return f"a head dim of {dim}: it must be at most {MOST_ATTENDED}"
        problem = unsupported_vectors(codec, dim)
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
    if (dim % factor == 0 and 32 <= dim <= 256) or (dim == WIDE and codec != "affine"):
        return None
    return f"a head dim of {dim}: it must be a multiple of {factor} from 32 to 256, or {WIDE}"


def cannot_lay_out(codec: KVCodec, tokens: Tokens) -> str | None:
    """None, or what the kernel can't do about ``tokens``, in words."""
    for name, x in zip((codec.spec.key_codec, codec.spec.value_codec), tokens.some):
        problem = unsupported_vectors(name, x.shape[-1])
        if problem:
            return problem
        if x.dtype not in DTYPES:
            return f"{x.dtype}: keys and values must be float16, bfloat16 or float32"
    return None

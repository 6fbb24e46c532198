"""Fused attention kernels: codes are dequantised in registers, never in memory.

Each is a module named after what it is written in, with

``attend(problem) -> mx.array``
    The attention, (B, H_q, N, D_v) in the dtype of the queries, of a
    :class:`~mlx_turboquant_plugin.attention.fused.Problem` that is not :func:`unsupported`.

And ``encode``, see :func:`encoder`.
"""

import functools
import itertools
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import mlx.core as mx

from ..codecs.kv_codec import SEGMENTED, CodecSpec, KVCodec

if TYPE_CHECKING:
    from ..attention.fused import Problem

FUSED = ("metal", "cuda")
# Those that are launched faster while arrays keep their shapes: caches hold as many exact
# tokens as can be needed then, and one goes when one comes.
STEADY = ("cuda",)
CODECS = (SEGMENTED, "lloyd-max", "affine")
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def fused_kernels() -> list[str]:
    """The names of the fused kernels that can run on the default device."""
    if mx.default_device().type != mx.gpu:
        return []
    return [name for name in FUSED if _runs_here(name)]


def _runs_here(name: str) -> bool:
    if not getattr(mx, name).is_available():
        return False
    # The CUDA kernels need instructions of Ampere, compute capability 8.0.
    return name != "cuda" or int(mx.device_info().get("compute_capability_major", 8)) >= 8


@functools.cache
def fused_kernel(name: str) -> ModuleType:
    """The module of a fused kernel."""
    return import_module(f".{name}", __package__)


def encoder(kernel: str) -> ModuleType | type[KVCodec]:
    """What makes the codes that a kernel reads, in as few launches as it can.

    Returns:
        A namespace of ``encode(codec, keys, values, start, older, part)``, which is the method
        of :class:`KVCodec` or does the same.
    """
    return fused_kernel(kernel) if kernel in FUSED else KVCodec


def unsupported(problem: "Problem") -> str | None:
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

"""The CUDA source of the kernels, and what makes kernels of it."""

import math
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from ...codecs.lloyd_max import CODEBOOKS
from ...codecs.segmented import SHIFTS, UNIT, USUAL_BITS
from ..metal import launch as metal
from ..sizes import (
    CUDA,
    BlockEncode,
    Codes,
    Dequantize,
    Merge,
    Scores,
    Simdgroups,
    Split,
    constants,
)
from . import nvrtc

# What device code has of the sizes.
TABLES = Scores, Codes, Split, Merge, BlockEncode

# Blocks of the first launch of attention that run at once on a multiprocessor.
BLOCKS = 4


def kernel(name: str, inputs: Sequence[str], outputs: Sequence[str], body: str) -> Any:
    """The kernel ``name``.

    Args:
        inputs, outputs: the names that ``body`` uses; inputs are contiguous.
        body: the function that the device runs; see :func:`source`.
    """
    if name in QUICK_PARTS and nvrtc.available():
        quick = ["types.cuh", *QUICK_PARTS[name]]
        numbers = _numbers(name, QUICK_TABLES.get(name, TABLES))
        header = "\n".join([numbers, *map(read, quick)])
        return nvrtc.Kernel(name, inputs, outputs, body, header, BOUNDS[name])
    # MLX may keep what it compiled under this name, and does not see the files.
    parts = map(read, PORTABLE_PARTS.get(name, PARTS))
    version = zlib.crc32("".join([_numbers(name), *parts, body]).encode())
    return mx.fast.cuda_kernel(
        name=f"turboquant_{name}_{version:08x}",
        input_names=inputs,
        output_names=outputs,
        source=body,
        header=source(name),
    )


PORTABLE_PARTS = {
    f"metal_{name}": ("dialect.cuh", *(f"{part}.metal" for part in metal.parts(name)))
    for name in ("decode", "merge", "dequantize")
}
SHARED_PARTS = ("ptx.cu", "warp.cu", "codes.cu", "rotation.cu", "rotary.cu")
PARTS = (
    *SHARED_PARTS,
    *(
        "encode.cu",
        "problem.cu",
        "full_precision.cu",
        "bias.cu",
        "keys.cu",
        "values.cu",
        "split.cu",
    ),
    "merge.cu",
)
# The kernels that are compiled without MLX's headers, and their parts: a first token waits for
# them. MLX looks at all machine code at every launch, though: what is long and runs in each step
# of decoding, split.cu, is left to MLX's own compilation.
QUICK_PARTS = {
    "encode": (*SHARED_PARTS, "encode.cu"),
    "merge": ("ptx.cu", "warp.cu", "rotation.cu", "merge.cu"),
    "metal_dequantize": PORTABLE_PARTS["metal_dequantize"],
}

# Each constant that a kernel need not have is in its machine code, too.
QUICK_TABLES = {"encode": (Codes, BlockEncode), "merge": (Scores, Merge)}

BOUNDS = {
    "split": f"{Split.THREADS}, {BLOCKS}",
    "merge": f"{Merge.MERGE_THREADS}",
    "encode": f"{32 * BlockEncode.ENCODED}",
    "metal_decode": f"{Simdgroups.THREADS}",
    "metal_merge": f"{Simdgroups.THREADS}",
    "metal_dequantize": f"{Dequantize.THREADS}",
}


def source(name: str) -> str:
    """The CUDA source that comes before the body of the kernel ``name``.

    MLX hashes all of it at every launch, for 15 us if the files were in it.
    """
    attributes = f"__attribute__((global)) __launch_bounds__({BOUNDS[name]})"
    # MLX writes the signature. The bounds give a thread of the first launch 128 registers.
    last = f"#undef __global__\n#define __global__ {attributes}\n"
    if name in PORTABLE_PARTS:
        return "\n".join([_numbers(name), *map(include, PORTABLE_PARTS[name]), last])
    return "\n".join([_numbers(name), *map(include, PARTS), last])


def include(part: str) -> str:
    """The line that brings in a file of this package."""
    return f'#include "{_file(part)}"'


def read(part: str) -> str:
    """The text of a file of this package."""
    return _file(part).read_text("utf-8")


def _file(part: str) -> Any:
    return files(metal.__package__ if part.endswith(".metal") else __package__) / part


def _numbers(name: str, tables: Sequence[type] = TABLES) -> str:
    """The constants and the codebooks of a kernel."""
    if name in PORTABLE_PARTS:
        return metal.numbers(name.removeprefix("metal_"), CUDA)
    return constants(*tables, integer=CUDA) + (_levels() if Codes in tables else "")


def _levels() -> str:
    """The codebooks, with tables for look_up() in codes.cu, and the numbers of segments."""
    text = ["template <int BITS> struct LEVELS;"]
    for bits, book in CODEBOOKS.items():
        upper = [math.floor(level) for level in book.levels]
        lower = [~level for level in reversed(upper)]
        table = lower + [level + 1 for level in upper] if bits == 4 else lower + upper
        numbers = np.array(table, np.int8).tobytes().ljust(16, b"\0")
        words = ", ".join(f"{word}u" for word in np.frombuffer(numbers, np.uint32))
        text.append(
            f"template <> struct LEVELS<{bits}> {{\n"
            f"  static constexpr unsigned words[4] = {{{words}}};\n"
            f"  static constexpr float unit = {book.unit}f;\n"
            "  __device__ static constexpr float positive(int i) {\n"
            f"    constexpr float levels[] = {{{', '.join(f'{x}f' for x in book.levels)}}};\n"
            "    return levels[i];\n  }\n};"
        )
    # Chosen in registers, where a table would be in memory.
    shifts = "".join(f"bits == {bits} ? {shift}f : " for bits, shift in SHIFTS.items())
    text.append(
        "struct SEGMENTED {\n"
        f"  static constexpr int usual_bits = {USUAL_BITS};\n"
        f"  static constexpr float unit = {UNIT}f;\n"
        "  __device__ static float shift(int bits) {\n"
        f"    return {shifts}0.0f;\n  }}\n}};"
    )
    return "\n".join(text)

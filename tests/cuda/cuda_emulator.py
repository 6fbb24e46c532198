"""Runs the CUDA kernels on the CPU, compiled by g++ or clang: no GPU, and no speed.

It shows that the arithmetic of indices and bytes is right, for threads in two orders, and
that nothing outside of the arrays matters. It is no model of a GPU's memory: races that
neither order shows are not seen.
"""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
from libraries import compiled

from mlx_turboquant_plugin.backends.cuda import source as cuda_source

TYPES = {
    mx.float32: "float",
    mx.float16: "_Float16",
    mx.bfloat16: "Bfloat16",
    mx.int32: "int",
    mx.uint8: "unsigned char",
    mx.uint32: "unsigned",
}
WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
HERE = Path(__file__).parent
OPTIONS = "-std=c++20 -O1 -w -fPIC".split()
# Memory around every array, and what outputs hold at first: not a number.
POISON, ALIGNMENT = 0xFF, 64


@functools.cache
def compiler() -> str | None:
    """A compiler of C++ with half precision, or None."""
    for path in filter(None, map(shutil.which, ("g++", "clang++", "clang++-19"))):
        command = [path, "-x", "c++", "-fsyntax-only", "-"]
        if subprocess.run(command, input=b"_Float16 x;", capture_output=True).returncode == 0:
            return path
    return None


class EmulatedKernel:
    """Stands where ``mx.fast.cuda_kernel`` would; arguments of calls are the same."""

    # Threads of a block in ascending or in descending order.
    descending = False

    def __init__(self, name: str, inputs, outputs, body: str, ensure_row_contiguous=True):
        self.name, self.inputs, self.outputs, self.body = name, inputs, outputs, body
        self.ensure_row_contiguous = ensure_row_contiguous

    def __call__(self, *, inputs, grid, threadgroup, output_shapes, output_dtypes, template=()):
        run = _compiled(self._source([x.dtype for x in inputs], output_dtypes, template))
        if self.ensure_row_contiguous:
            inputs = [mx.contiguous(x) for x in inputs]
        words = [np.array(x.view(WORDS[x.dtype.size]), copy=False) for x in inputs]
        given = [_placed(x) for x in words]
        sizes = [np.prod(shape) * t.size for shape, t in zip(output_shapes, output_dtypes)]
        outs = [_guarded(bytes([POISON]) * int(size)) for size in sizes]
        shapes, strides = (np.zeros((len(inputs), 10), t) for t in (np.int32, np.int64))
        for shape, stride, x in zip(shapes, strides, words):
            shape[: x.ndim] = x.shape
            stride[: x.ndim] = np.array(x.strides) // x.itemsize
        pointers = np.array([view.ctypes.data for _, view in (*given, *outs)], np.uint64)
        threads = threadgroup[0]
        blocks = np.array([grid[0] // threads, grid[1], grid[2]], np.int32)
        arrays = (ctypes.c_void_p(x.ctypes.data) for x in (pointers, shapes, strides, blocks))
        _runtime().launch(run, *arrays, threads, EmulatedKernel.descending)
        for memory, view in outs:
            start = view.ctypes.data - memory.ctypes.data
            outside = np.concatenate([memory[:start], memory[start + view.nbytes :]])
            assert (outside == POISON).all(), f"{self.name} writes outside of an output"
        return [
            mx.array(view).view(t).reshape(shape)
            for (_, view), shape, t in zip(outs, output_shapes, output_dtypes)
        ]

    def _source(self, input_types, output_types, template) -> str:
        # The parameters as MLX writes them.
        parameters, arguments = [], []
        for i, (name, dtype) in enumerate(zip(self.inputs, input_types)):
            parameters.append(f"const {TYPES[dtype]}* {name}")
            arguments.append(f"(const {TYPES[dtype]}*)pointers[{i}]")
            if f"{name}_shape" in self.body:
                parameters.append(f"Shape {name}_shape")
                arguments.append(f"shapes[{i}]")
            if f"{name}_strides" in self.body:
                parameters.append(f"Strides {name}_strides")
                arguments.append(f"strides[{i}]")
        for i, (name, dtype) in enumerate(zip(self.outputs, output_types)):
            parameters.append(f"{TYPES[dtype]}* {name}")
            arguments.append(f"({TYPES[dtype]}*)pointers[{len(self.inputs) + i}]")
        constants = "".join(_constant(*pair) for pair in template)
        # The header has what ptx.cu has.
        header = cuda_source.source(self.name).replace(cuda_source.include("ptx.cu"), "")
        return f"""#include "cuda_emulator.h"
{header}
#undef __global__
static void kernel({", ".join(parameters)}) {{
{constants}{self.body}
}}
extern "C" void run(void** pointers, Shape* shapes, Strides* strides) {{
  kernel({", ".join(arguments)});
}}
"""


def _placed(x: np.ndarray):
    """``x`` with its strides in poisoned memory: between its numbers lies poison, too."""
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.strides)) + x.itemsize
    memory, view = _guarded(bytes([POISON]) * (span if x.size else 0))
    if x.size:
        np.ndarray(x.shape, x.dtype, view, strides=x.strides)[...] = x
    return memory, view


def _guarded(content: bytes):
    """``content`` in the middle of poisoned memory, aligned as MLX's buffers are."""
    memory = np.full(len(content) + 3 * ALIGNMENT, POISON, np.uint8)
    start = ALIGNMENT + -memory.ctypes.data % ALIGNMENT
    view = memory[start : start + len(content)]
    view[...] = np.frombuffer(content, np.uint8)
    return memory, view


def _constant(name: str, value) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};\n"
    return f"using {name} = {TYPES[value]};\n"


@functools.cache
def _header() -> Path:
    """The emulator's header, compiled: a third of the time of each kernel."""
    header = HERE / "cuda_emulator.h"
    return _built(f"{header.name}.gch", header.read_bytes(), "-x", "c++-header", header)


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The library that runs kernels; theirs are linked to it."""
    code = HERE / "cuda_emulator.cpp"
    sources = code.read_bytes(), (HERE / "cuda_emulator.h").read_bytes()
    return ctypes.CDLL(str(_built("runtime.so", sources, "-shared", code)))


@functools.cache
def _compiled(source: str):
    libraries = str(_header()), _runtime()._name
    # g++ takes another version's compiled header for none.
    folders = f"-I{_header().parent}", f"-I{HERE}"
    options = *folders, "-shared", "-x", "c++", "-", "-x", "none", _runtime()._name
    return ctypes.CDLL(str(_built("kernel.so", (source, *libraries), *options, code=source))).run


def _built(name: str, content, *arguments, code: str = "") -> Path:
    command = [compiler(), *OPTIONS, *map(str, arguments), "-o"]

    def build(target):
        subprocess.run([*command, str(target)], input=code, text=True, check=True)

    return compiled(name, build, compiler(), OPTIONS, content)

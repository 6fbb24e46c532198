"""CUDA kernels compiled by NVRTC without MLX's headers.

``mx.fast.cuda_kernel`` includes headers that take NVRTC two seconds for each kernel. What is
on the way of a first prompt can't wait for that: these take tenths.
"""

import ctypes
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

# The names of dtypes in ``types.cuh`` and in C++.
TYPES = {
    mx.float32: "float",
    mx.float16: "Half",
    mx.bfloat16: "Bfloat",
    mx.int32: "int",
    mx.uint32: "unsigned",
    mx.uint8: "unsigned char",
}


class Kernel:
    """A kernel with the interface of what ``mx.fast.cuda_kernel`` returns.

    In the body ``name_shape`` is what MLX would give for an input. All inputs are made
    contiguous.

    Args:
        header: comes before the kernel.
        bounds: of ``__launch_bounds__``.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        body: str,
        header: str,
        bounds: str,
    ):
        self.name, self.inputs, self.outputs = name, tuple(inputs), tuple(outputs)
        self.body, self.header, self.bounds = body, header, bounds
        self._shaped = [f"{name}_shape" in body for name in inputs]
        self._compiled: dict[tuple, tuple[str, bytes]] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] = (),
    ) -> list[mx.array]:
        """Launch it; arguments as in MLX."""
        dims = tuple(x.ndim if shaped else 0 for x, shaped in zip(inputs, self._shaped))
        key = tuple(x.dtype for x in inputs), dims, tuple(output_dtypes), tuple(template)
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        name, code = self._compiled[key]
        return mx.fast.precompiled_cuda_kernel(
            name=name,
            compiled_source=code,
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[n for x, dim in zip(inputs, dims) if dim for n in x.shape],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )

    def _compile(self, dtypes, dims, output_dtypes, template) -> tuple[str, bytes]:
        parameters = [f"const {TYPES[t]}* {name}" for name, t in zip(self.inputs, dtypes)]
        parameters += [f"{TYPES[t]}* {name}" for name, t in zip(self.outputs, output_dtypes)]
        constants = []
        for name, dim in zip(self.inputs, dims):
            numbers = [f"{name}_shape_{i}" for i in range(dim)]
            parameters += [f"int {number}" for number in numbers]
            if dim:
                constants.append(f"  const int {name}_shape[] = {{{', '.join(numbers)}}};\n")
        for name, value in template:
            if isinstance(value, mx.Dtype):
                constants.append(f"  using {name} = {TYPES[value]};\n")
            else:
                constants.append(f"  constexpr int {name} = {int(value)};\n")
        text = f"({', '.join(parameters)}) {{\n{''.join(constants)}{self.body}\n}}\n"
        version = zlib.crc32((self.header + text).encode())
        name = f"turboquant_{self.name}_{version:08x}"
        signature = f'extern "C" __global__ __launch_bounds__({self.bounds}) void {name}'
        return name, compile_cubin(f"{self.header}\n{signature}{text}", name)


def compile_cubin(source: str, name: str) -> bytes:
    """Machine code of CUDA C++ for this GPU.

    Raises:
        RuntimeError: it does not compile; the message has NVRTC's log.
    """
    info = mx.device_info()
    arch = f"{info['compute_capability_major']}{info['compute_capability_minor']}"
    options = [
        f"--gpu-architecture=sm_{arch}",
        "--std=c++17",
        "--device-as-default-execution-space",
    ]
    library, program = _library(), ctypes.c_void_p()
    assert library is not None, "there is NVRTC where kernels are available"
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
        )
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise RuntimeError(f"NVRTC does not compile {name}:\n{log.decode(errors='replace')}")
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def available() -> bool:
    """Whether kernels can be compiled and run like this."""
    return hasattr(mx.fast, "precompiled_cuda_kernel") and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The NVRTC that MLX has loaded."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "libnvrtc.so" in line}
    return ctypes.CDLL(min(paths)) if paths else None


def _read(size_of: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC reports error {result}")

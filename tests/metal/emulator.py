"""Runs Metal kernels on the CPU: a stand-in for ``mx.fast.metal_kernel``.

    with emulator.patch(mode="checked", schedule=0, poison=0):
        ...  # unmodified code that builds and calls Metal kernels

The text that MLX would give to Metal's compiler (``signature``) is compiled as C++ (``compiler``)
against the headers of ``shim.h``; ``runtime.cpp`` runs its threads. In the mode "checked" every
access to memory is looked at, and the first thing that Metal does not define raises
:class:`EmulatorError` with its line: accesses out of bounds or misaligned, reads of memory that
nobody has written, outputs that stay unwritten, data races, barriers and simdgroup functions
that only some threads come to, threadgroups that never end, and too much of threadgroup memory
or threads. The mode "fast" only notices the crudest of these, at tens of times the speed.

Kernels can't know in which order threads run: ``schedule`` 0 runs them ascending, 1
descending, and each other number in a random order of its own. ``poison`` is the number of the
pattern in :data:`POISONS` that uninitialized memory is filled with.

No statement about speed, registers, fast mathematics or a real compiler's faults follows from
any of this. Atomics, textures and simdgroup matrices do not exist here, and comparisons of
vectors give -1 and not true.
"""

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import compiler
import mlx.core as mx
import numpy as np
from compiler import EmulatorError, Unavailable
from signature import Signature, generate

__all__ = ["POISONS", "EmulatorError", "Unavailable", "metal_kernel", "patch", "unavailable"]

# NaN as float, half and bfloat; a large number; zeros, which hide most faults.
POISONS = (0x7FFE7FFE, 0x5A5A5A5A, 0)

MODES = ("checked", "fast")


@dataclass(frozen=True)
class Settings:
    mode: str = "checked"
    schedule: int = 0
    poison: int = 0
    seconds: float = 30.0  # of CPU time, for one launch


_settings = Settings()
_one_launch = threading.Lock()


def unavailable() -> str | None:
    """Why this machine can't run the emulator, or None: a reason to skip tests."""
    try:
        compiler.clang()
    except Unavailable as error:
        return str(error)
    return None


@contextlib.contextmanager
def patch(mode: str = "checked", schedule: int = 0, poison: int = 0, seconds: float = 30.0):
    """Metal on this machine, as far as ``mx`` tells.

    ``mx.compile`` does nothing meanwhile, since an emulated kernel needs values and can't be
    traced.
    """
    if mode not in MODES or not 0 <= poison < len(POISONS) or schedule < 0:
        raise ValueError(
            f"mode {mode!r}, schedule {schedule}, poison {poison}: a mode of {MODES}, a "
            f"schedule of 0 or more, and a poison below {len(POISONS)} are possible"
        )
    global _settings
    before = (_settings, mx.fast.metal_kernel, mx.metal.is_available)
    _settings = Settings(mode, schedule, poison, seconds)
    mx.fast.metal_kernel = metal_kernel
    mx.metal.is_available = lambda: True
    mx.disable_compile()
    try:
        yield
    finally:
        _settings, mx.fast.metal_kernel, mx.metal.is_available = before
        if mx.fast.metal_kernel is not metal_kernel:
            mx.enable_compile()


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
):
    """See ``mx.fast.metal_kernel``. What the kernel returns is computed at once."""

    def call(
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ):
        if len(inputs) != len(input_names):
            raise ValueError(f"{name} takes {len(input_names)} inputs and got {len(inputs)}")
        if not len(output_shapes) == len(output_dtypes) == len(output_names):
            raise ValueError(f"{name} has {len(output_names)} outputs: other shapes or dtypes")
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        mx.eval(arrays)
        signature = generate(
            name,
            list(zip(input_names, arrays)),
            list(zip(output_names, output_dtypes)),
            source,
            header,
            template or (),
            atomic_outputs,
        )
        if verbose:
            print(signature.text)
        buffers = {}
        for key, array in zip(input_names, arrays):
            memory, strides = _memory(array, ensure_row_contiguous)
            buffers[key, "data"] = memory
            buffers[key, "shape"] = np.array(array.shape, np.int32)
            buffers[key, "strides"] = np.array(strides, np.int64)
            buffers[key, "ndim"] = np.array(array.ndim, np.int32)
        for key, shape, dtype in zip(output_names, output_shapes, output_dtypes):
            initial = mx.full(shape, 0 if init_value is None else init_value, dtype)
            buffers[key, "output"] = np.array(_bits(initial))
        _launch(signature, buffers, grid, threadgroup, init_value is not None)
        results = (mx.array(buffers[key, "output"]) for key in output_names)
        return [
            result.view(mx.bfloat16) if dtype == mx.bfloat16 else result
            for result, dtype in zip(results, output_dtypes)
        ]

    return call


def _bits(array: mx.array) -> mx.array:
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def _memory(array: mx.array, contiguous: bool) -> tuple[np.ndarray, Sequence[int]]:
    """What the kernel's pointer points to, and the strides in elements."""
    view = np.array(_bits(array), copy=False)
    if contiguous or view.flags.c_contiguous:
        view = np.ascontiguousarray(view).reshape(array.shape)
        steps = np.cumprod((1, *array.shape[:0:-1]))[::-1]
        return view, steps[: array.ndim]
    steps = [stride // view.itemsize for stride in view.strides]
    if min(steps) < 0:
        raise EmulatorError("inputs with negative strides are not supported")
    span = 1 + sum((size - 1) * step for size, step in zip(view.shape, steps))
    whole = np.lib.stride_tricks.as_strided(view, (span,), (view.itemsize,))
    return np.ascontiguousarray(whole), steps


# ---------------------------------------------------------------------------- the runtime


class _Argument(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("element", ctypes.c_uint),
        ("output", ctypes.c_int),
        ("initialized", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(_Argument)),
        ("argument_count", ctypes.c_uint),
        ("grid", ctypes.c_uint * 3),
        ("threadgroup", ctypes.c_uint * 3),
        ("schedule", ctypes.c_uint),
        ("poison", ctypes.c_uint),
        ("checked", ctypes.c_uint),
        ("seconds", ctypes.c_double),
        ("finding", ctypes.c_char * 1024),
        ("line", ctypes.c_int),
        ("instruction", ctypes.c_size_t),
    ]


def _launch(signature: Signature, buffers, grid, threadgroup, initialized: bool) -> None:
    settings = _settings
    library = compiler.kernel(signature, settings.mode == "checked")
    arguments = (_Argument * len(signature.parameters))()
    for argument, parameter in zip(arguments, signature.parameters):
        memory = buffers[parameter.array, parameter.content]
        argument.name = parameter.name.encode()
        argument.data = memory.ctypes.data
        argument.bytes = memory.nbytes
        argument.element = memory.itemsize
        argument.output = parameter.content == "output"
        argument.initialized = initialized or not argument.output
    launch = _Launch(
        kernel=ctypes.cast(library.emu_kernel, ctypes.c_void_p),
        arguments=arguments,
        argument_count=len(arguments),
        grid=tuple(grid),
        threadgroup=tuple(threadgroup),
        schedule=settings.schedule,
        poison=POISONS[settings.poison],
        checked=settings.mode == "checked",
        seconds=settings.seconds,
    )
    with _one_launch:
        good = compiler.runtime().emu_run(ctypes.byref(launch))
    if good:
        return
    finding = launch.finding.decode(errors="replace")
    line = launch.line or compiler.source_line(library, launch.instruction)
    if line:
        finding += f" (line {line}: `{signature.text.splitlines()[line - 1].strip()}`)"
    raise EmulatorError(f"{signature.instance}: {finding}")

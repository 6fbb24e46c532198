"""The Metal function that MLX generates around the body given to ``mx.fast.metal_kernel``.

The rules are those of mlx/backend/common/metal_kernel.cpp; ``test_emulator.py`` compares the
text with what MLX itself prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

# In MLX's order. Those that the body mentions become parameters.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

# Inputs with fewer elements live in the constant address space.
SMALLEST_DEVICE_INPUT = 8

_TYPES = {
    mx.bool_: "bool",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    **{
        getattr(mx, f"{sign}int{bits}"): f"{sign}int{bits}_t"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class Parameter:
    """A buffer of the kernel.

    Attributes:
        array: the name of the input or output it belongs to.
        content: "data", "shape", "strides" or "ndim" of an input, or "output".
        type: as declared, without its last ``*`` or ``&``.
        reference: whether it is declared as a reference.
    """

    array: str
    content: str
    type: str
    reference: bool

    @property
    def name(self) -> str:
        return self.array + ("" if self.content in ("data", "output") else "_" + self.content)


@dataclass(frozen=True)
class Signature:
    """A whole kernel.

    Attributes:
        text: the Metal source, as MLX prints it under ``verbose``.
        instance: the expression that names the function, with its template arguments.
        parameters: in the order of the function's, before the attributes.
        attributes: the names of thread attributes that it takes.
    """

    text: str
    instance: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]


def generate(
    name: str,
    inputs: Sequence[tuple[str, mx.array]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    source: str,
    header: str = "",
    template: Sequence[tuple[str, object]] = (),
    atomic_outputs: bool = False,
) -> Signature:
    """The kernel for inputs of these shapes and dtypes; 0-dimensional ones are references."""
    arguments = ", ".join(_template_argument(value) for _, value in template)
    function = _function_name(name, arguments, inputs, outputs)
    instance = f"{function}<{arguments}>" if template else function
    parameters = _inputs(inputs, source) + _outputs(outputs, atomic_outputs)
    attributes = tuple(attribute for attribute in ATTRIBUTES if attribute in source)

    lines = []
    for index, parameter in enumerate(parameters):
        mark = "&" if parameter.reference else "*"
        line = f"  {parameter.type}{mark} {parameter.name} [[buffer({index})]]"
        # MLX counts the inputs here, not the buffers: with two outputs, the shape of an
        # input and no thread attribute, it closes the list twice, which does not compile.
        more = index < len(inputs) + len(outputs) - 1 or attributes
        lines.append(line + (",\n" if parameter.content != "output" or more else ") {\n"))
    for index, attribute in enumerate(attributes):
        line = f"  {ATTRIBUTES[attribute]} {attribute} [[{attribute}]]"
        lines.append(line + (",\n" if index < len(attributes) - 1 else ") {\n"))

    text = header
    if template:
        kinds = ", ".join(f"{_template_kind(value)} {key}" for key, value in template)
        text += f"template <{kinds}>\n"
    text += f"[[kernel]] void {function}(\n{''.join(lines)}{source}\n}}\n"
    if template:
        text += (
            f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({instance}) {instance};\n'
        )
    return Signature(text, instance, parameters, attributes)


def _function_name(name, arguments, inputs, outputs) -> str:
    parts = ["custom_kernel_" + name]
    if arguments:
        parts.append("_" + arguments.replace(", ", "_"))
    for _, array in inputs:
        kind = "s" if array.ndim == 0 else "c" if array.size < SMALLEST_DEVICE_INPUT else ""
        parts.append(_TYPES[array.dtype] + kind)
    parts += [_TYPES[dtype] for _, dtype in outputs]
    return "_".join(parts)


def _inputs(inputs, source) -> tuple[Parameter, ...]:
    parameters: list[Parameter] = []
    for name, array in inputs:
        space = "constant" if array.size < SMALLEST_DEVICE_INPUT else "device"
        type_ = f"const {space} {_TYPES[array.dtype]}"
        parameters.append(Parameter(name, "data", type_, array.ndim == 0))
        if array.ndim == 0:
            continue
        for content, element in (("shape", "int"), ("strides", "int64_t"), ("ndim", "int")):
            if f"{name}_{content}" in source:
                type_ = f"const constant {element}"
                parameters.append(Parameter(name, content, type_, content == "ndim"))
    return tuple(parameters)


def _outputs(outputs, atomic) -> tuple[Parameter, ...]:
    form = "device atomic<{}>" if atomic else "device {}"
    return tuple(
        Parameter(name, "output", form.format(_TYPES[dtype]), False) for name, dtype in outputs
    )


def _template_argument(value) -> str:
    if isinstance(value, mx.Dtype):
        return _TYPES[value]
    if value < 0:
        # It becomes part of the function's name as it is.
        raise ValueError(f"template argument {value}: MLX 0.32.2 can't compile negative ones")
    return str(int(value))


def _template_kind(value) -> str:
    if isinstance(value, mx.Dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"

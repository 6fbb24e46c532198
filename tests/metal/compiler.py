"""Compiles a Metal kernel for the CPU, with clang and the headers beside this file."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from libraries import compiled
from signature import Signature

HERE = Path(__file__).resolve().parent
OLDEST_CLANG = 17  # the first with arithmetic in __bf16

# C++14 is what Metal is based on. Every operation in half precision is rounded, and nothing
# is contracted to a fused multiply-add.
_FLAGS = """
-march=x86-64-v3 -fPIC -fno-exceptions -fno-strict-aliasing -fwrapv -ffp-contract=off
-gline-tables-only
""".split()
_KERNEL_FLAGS = """
-x c++ -std=c++14 -nostdinc -fno-rtti -fvisibility=hidden -fstack-clash-protection
-ftrivial-auto-var-init=pattern
-Xclang -cl-single-precision-constant -Xclang -ffloat16-excess-precision=none
-Xclang -fbfloat16-excess-precision=none
-Wno-unknown-attributes -Wno-ignored-attributes -Wno-c++17-extensions -Wno-psabi
-Wno-duplicate-decl-specifier -Wno-user-defined-literals -Wno-reserved-user-defined-literal
-Wno-unused-value -Wimplicit-float-conversion
-S -emit-llvm -Xclang -disable-llvm-passes
""".split()
# The sanitizers only put calls into the code; the runtime answers them.
_CHECKS = """
-fsanitize=thread,shift-exponent,integer-divide-by-zero,float-cast-overflow,bounds
""".split()
_ACCESS_CHECKS = """
-Xclang -fsanitize=thread,local-bounds -mllvm -tsan-instrument-func-entry-exit=0
-mllvm -tsan-instrument-read-before-write=1
""".split()


class EmulatorError(RuntimeError):
    """The kernel is not valid Metal, or did something that Metal does not define."""


class Unavailable(EmulatorError):
    """This machine can't run the emulator."""


@cache
def clang() -> str:
    """The path of the newest clang.

    Raises:
        Unavailable: there is none, or it is too old, or the machine is of another kind.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("the Metal emulator needs Linux on x86-64")
    for name in [f"clang++-{n}" for n in range(25, OLDEST_CLANG - 1, -1)] + ["clang++"]:
        path = shutil.which(name)
        if path and _version(path) >= OLDEST_CLANG:
            return path
    raise Unavailable(
        f"the Metal emulator needs clang {OLDEST_CLANG} or newer (apt-get install clang-19)"
    )


def _version(path: str) -> int:
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)", text)
    return int(match.group(1)) if match else 0


@cache
def runtime() -> ctypes.CDLL:
    """The library that runs kernels; theirs are linked to it."""

    def build(target):
        _compile([*_FLAGS, "-std=c++17", "-O2", "-shared", HERE / "runtime.cpp", "-o", target])

    names = "compiler.py interface.h launch.h memory.h runtime.cpp shim.h threads.h".split()
    sources = [(HERE / name).read_bytes() for name in names]
    return ctypes.CDLL(str(compiled("runtime.so", build, clang(), *sources)))


@cache
def kernel(signature: Signature, checked: bool) -> ctypes.CDLL:
    """The kernel as a library; ``emu_kernel`` in it runs one thread.

    Raises:
        EmulatorError: it does not compile, or breaks a rule that C++ does not have.
    """
    text = _as_cpp(signature)

    def build(target):
        _build_kernel(text, checked, target)

    path = compiled("kernel.so", build, runtime()._name, text, checked)
    # Its own runtime before any that the process has loaded for other ends.
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)


def source_line(library: ctypes.CDLL, instruction: int) -> int:
    """The line of the kernel's text that the instruction at this offset is from, or 0."""
    tool = shutil.which("llvm-symbolizer") or shutil.which("addr2line")
    if not tool or not instruction:
        return 0
    command = [tool, "-i", "-e", library._name, hex(instruction)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    match = re.search(r"kernel\.metal:(\d+)", output)
    return int(match.group(1)) if match else 0


# ---------------------------------------------------------------------------- Metal as C++


def _as_cpp(signature: Signature) -> str:
    # Same lines, so that messages fit the text that MLX prints.
    text = _without_comments(signature.text.split("\ntemplate [[host_name(")[0])
    _check_pointers(text)
    text = _share_variables(text)
    text = re.sub(r"\bvec\s*<([^<>()]*)>\s*\(", r"emu_make<vec<\1>>(", text)
    vectors = "\n".join(
        f"#define {element}{size}(...) emu_make<{element}{size}>(__VA_ARGS__)"
        for element in "char uchar short ushort int uint long ulong half bfloat float bool".split()
        for size in (2, 3, 4)
    )
    arguments = [
        f"{'*' if parameter.reference else ''}({parameter.type}*)(size_t)buffers[{index}]"
        for index, parameter in enumerate(signature.parameters)
    ]
    arguments += [f"attributes->{name}" for name in signature.attributes]
    return f"""#include "shim.h"
{vectors}
#line 1 "kernel.metal"
{text}
#line 1 "call"
extern "C" __attribute__((visibility("default"), no_sanitize("thread")))
void emu_kernel(void** buffers, const emu_attributes* attributes) {{
  {signature.instance}({", ".join(arguments)});
}}
"""


def _without_comments(text: str) -> str:
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.S
    )


def _share_variables(text: str) -> str:
    """Declarations of threadgroup memory as references to memory of the runtime's."""
    number = 0

    def replace(match):
        nonlocal number
        owner = f"emu_owner_{number}"
        before, declaration = match.groups()
        flat = re.sub(r"<[^<>]*>|\[[^\[\]]*\]", "", declaration)
        parts = []
        for declarator in flat.split(","):
            name = re.findall(r"\w+", declarator)[-1]
            parts.append(f"EMU_THREADGROUP({owner}, {name}, {number})")
            number += 1
        return f"{before}struct {owner} {{ {declaration}; }}; {'; '.join(parts)}"

    return re.sub(r"([;{}]\s*)threadgroup\s+((?:[^][;*&()=]|\[[^]]*\])+)(?=;)", replace, text)


# What points has to say where to; plain C++ takes silence for thread memory.
_POINTER = re.compile(
    r"(?<=[;{}(,])\s*(?:(?:const|volatile|static|constexpr)\s+)*(\w+(?:<[^<>]*>)?)"
    r"\s*(?:const\s*)?[*&]\s*(?:const\s+)?\w+\s*(?=[=;,)\[])"
)
_TYPE = re.compile(
    r"(?:(?:bool|u?char|u?short|u?int|u?long|half|bfloat|float)[234]?|u?int\d+_t|b?float16_t"
    r"|size_t|auto|vec<.*)$"
)


def _check_pointers(text: str) -> None:
    own = set(re.findall(r"\b(?:typename|struct|using)\s+(\w+)", text))
    for match in _POINTER.finditer(text):
        if _TYPE.match(match.group(1)) or match.group(1) in own:
            line = text.count("\n", 0, match.end()) + 1
            raise EmulatorError(
                f"line {line}: `{match.group().strip()}` names no address space "
                "(device, constant, threadgroup or thread)"
            )


# ---------------------------------------------------------------------------- compilation


def _build_kernel(text: str, checked: bool, target: Path) -> None:
    source = target.with_suffix(".cpp")
    code = target.with_suffix(".ll")
    source.write_text(text)
    flags = [*_FLAGS, "-O1" if checked else "-O2"]
    front = [*flags, *_KERNEL_FLAGS, *(_CHECKS if checked else [])]
    warnings = _compile([*front, f"-I{HERE}", source, "-o", code])
    narrowed = re.search(r"kernel\.metal:.*floating-point precision.* to 'bfloat.*", warnings)
    if narrowed:
        raise EmulatorError(f"bfloat takes no float without a conversion: {narrowed.group()}")
    code.write_text(_one_address_space(code.read_text()))
    back = [*flags, "-Wno-override-module", "-shared", "-Wl,-z,defs"]
    _compile([*back, *(_ACCESS_CHECKS if checked else []), code, runtime()._name, "-o", target])


def _one_address_space(code: str) -> str:
    """LLVM code as it is once the front end has enforced the address spaces."""
    # Explicit casts between them pass in C++, and so do variables outside of any function.
    for line in code.splitlines():
        if "addrspacecast" in line:
            raise EmulatorError(f"{_place(code, line)}a cast between address spaces")
        outside = re.match(r"@(\w+) = (?:internal |linkonce_odr |hidden |dso_local )*global ", line)
        if outside:
            raise EmulatorError(
                f"{outside.group(1)} lies outside of the kernel and not in the constant space"
            )
    code = re.sub(r" addrspace\(\d\)", "", code)
    code = re.sub(r"\.p[123]\b", ".p0", code)
    # Intrinsic functions of several spaces are now declared several times.
    declarations = {}
    for match in re.finditer(r"^declare .*?(@[\w.]+)\(.*\n", code, re.M):
        declarations[match.group(1)] = match.group()
    return re.sub(r"^declare .*\n", "", code, flags=re.M) + "".join(declarations.values())


def _place(code: str, line: str) -> str:
    location = re.search(r"!dbg (!\d+)", line)
    if location:
        number = re.search(rf"^{location.group(1)} = .*?line: (\d+)", code, re.M)
        if number:
            return f"line {number.group(1)}: "
    return ""


def _compile(arguments) -> str:
    command = [clang(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulatorError(f"the kernel does not compile:\n{done.stderr[:4000]}")
    return done.stderr

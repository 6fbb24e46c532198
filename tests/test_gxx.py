"""The g++ of the tests, in ``tests/gxx``: what MLX asks for is built once for all processes."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest
from processes import run_python

pytestmark = pytest.mark.skipif(
    "BUILT_BY_GXX" not in os.environ or mx.default_device().type == mx.gpu,
    reason="MLX does not compile with it here",
)


def compile_for_mlx(source, library, **variables):
    """Call g++ as MLX does; returns its exit status."""
    headers = Path(mx.__file__).parent / "include"
    options = ["-std=c++17", "-O3", "-Wall", "-fPIC", "-shared", "-I", headers]
    command = ["g++", *options, source, "-o", library]
    return subprocess.run(command, env={**os.environ, **variables}).returncode


def test_it_is_what_mlx_calls(tmp_path):
    built = Path(os.environ["BUILT_BY_GXX"])
    before = len([*built.glob("*.so")])
    # A number that no other function has.
    function = f"mx.compile(lambda x: x * {time.time()} + x)"
    code = f"import mlx.core as mx; mx.eval({function}(mx.ones(2)))"
    run_python("-c", code, TMPDIR=str(tmp_path))
    assert len([*built.glob("*.so")]) > before
    assert [*tmp_path.rglob("*.so")]


def test_the_second_process_gets_the_firsts_library(tmp_path):
    source, first, second = (tmp_path / name for name in ("x.cpp", "first.so", "second.so"))
    include = '#include "mlx/backend/cpu/compiled_preamble.h"'
    source.write_text(f'{include}\nconst char* made() {{ return "{tmp_path}"; }}\n')
    assert compile_for_mlx(source, first) == 0
    assert compile_for_mlx(source, second, REAL_GXX=shutil.which("false")) == 0
    assert first.read_bytes() == second.read_bytes()


def test_what_does_not_compile_leaves_nothing(tmp_path):
    source, library = tmp_path / "x.cpp", tmp_path / "x.so"
    source.write_text(f"no C++ in {tmp_path}")
    assert compile_for_mlx(source, library) != 0
    assert not library.exists()

"""The emulator itself: what it must compute, and what it must notice."""

import shutil
import sys
import tempfile
import threading
from pathlib import Path

import emulator
import mlx.core as mx
import numpy as np
import pytest
from signature import generate

pytestmark = pytest.mark.skipif(
    emulator.unavailable() is not None, reason=str(emulator.unavailable())
)

# Another emulator, if it is there: both must come to the same.
PROTOTYPE = Path(__file__).resolve().parents[3] / "shared" / "tools" / "metalemu"

A = mx.arange(64).astype(mx.float32)
EVERY_RUN = [
    ("fast", 0, 0),
    ("checked", 0, 0),
    ("checked", 1, 1),
    ("checked", 2, 0),
    ("checked", 3, 1),
]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
START = "uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"


def run(source, inputs=(A,), grid=(64, 1, 1), group=None, shape=(64,), dtype=mx.float32, **more):
    """One output of a kernel of inputs a, b, c ..."""
    launch = {key: more.pop(key) for key in ("template", "init_value") if key in more}
    kernel = mx.fast.metal_kernel(
        name="t",
        input_names=list("abcd")[: len(inputs)],
        output_names=["out"],
        source=source,
        **more,
    )
    (result,) = kernel(
        inputs=list(inputs),
        grid=grid,
        threadgroup=group or grid,
        output_shapes=[shape],
        output_dtypes=[dtype],
        **launch,
    )
    return np.array(result.astype(mx.float32) if dtype == mx.bfloat16 else result)


@pytest.fixture(params=EVERY_RUN, ids=lambda each: "-".join(map(str, each)))
def everywhere(request):
    mode, schedule, poison = request.param
    with emulator.patch(mode=mode, schedule=schedule, poison=poison):
        yield


# ---------------------------------------------------------------------------- signatures

SOURCES = (
    "uint i = thread_position_in_grid.x; out[i] = x[i];",
    "/* x_shape x_strides y_ndim threads_per_grid simdgroup_index_in_threadgroup */ out[0] = x[0];",
    "out[0] = x[0]; out2[0] = y_shape[0];",
    "uint2 l = uint2(thread_index_in_threadgroup, quadgroups_per_threadgroup); out[0] = x[l.x];",
)
TEMPLATES = ((), [("T", mx.float16)], [("N", 3), ("B", True), ("C", False), ("T", mx.bfloat16)])


@pytest.mark.parametrize("template", TEMPLATES, ids=["plain", "type", "values"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_signature_is_that_of_mlx(source, template, capfd, tmp_path):
    # Tracing the call for an export makes MLX print the kernel, also where it can't run it.
    for header in ("", "inline float twice(float v) { return 2 * v; }\n"):
        for atomic in (False, True):
            for shapes in (((4, 8), (7,)), ((8,), ()), ((1,), (2, 2, 2))):
                for dtype in (mx.float32, mx.uint32, mx.bool_, mx.bfloat16, mx.int8, mx.int64):
                    x, y = (mx.zeros(shape).astype(dtype) for shape in shapes)
                    kernel = mx.fast.metal_kernel(
                        "t", ["x", "y"], ["out", "out2"], source, header, atomic_outputs=atomic
                    )

                    def call(x, y, kernel=kernel):
                        return kernel(
                            inputs=[x, y],
                            template=list(template),
                            grid=(1, 1, 1),
                            threadgroup=(1, 1, 1),
                            output_shapes=[(1,), (1,)],
                            output_dtypes=[mx.float32, mx.uint8],
                            verbose=True,
                        )[0]

                    mx.export_function(str(tmp_path / "kernel.mlxfn"), call, x, y)
                    printed = capfd.readouterr().out
                    ours = generate(
                        "t",
                        [("x", x), ("y", y)],
                        [("out", mx.float32), ("out2", mx.uint8)],
                        source,
                        header,
                        template,
                        atomic,
                    )
                    assert printed.split("```\n", 1)[1].rsplit("\n```", 1)[0] == ours.text


def test_negative_template_arguments_are_refused():
    with emulator.patch(), pytest.raises(ValueError, match="-2"):
        run(START + "out[i] = N;", template=[("N", -2)])


# ---------------------------------------------------------------------------- correct kernels


def test_threadgroup_memory(everywhere):
    source = f"threadgroup float s[64], unused[2]; s[i] = a[i]; {BARRIER} out[i] = s[63 - i];"
    assert (run(START + source) == np.arange(64)[::-1]).all()


def test_a_simdgroup_barrier_orders_a_simdgroup(everywhere):
    source = """threadgroup float s[64]; s[i] = a[i];
    simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[i ^ 1];"""
    assert (run(START + source) == (np.arange(64) ^ 1)).all()


def test_barriers_in_a_loop(everywhere):
    source = f"""threadgroup float s[64]; s[i] = a[i];
    for (uint step = 32; step > 0; step /= 2) {{
      {BARRIER} float other = s[i ^ step]; {BARRIER} s[i] += other;
    }}
    out[i] = s[i];"""
    assert (run(START + source) == 64 * 63 / 2).all()


X = np.random.default_rng(0).integers(0, 1000, (2, 32)).astype(np.float32)
LANES = np.arange(32)
SIMD_FUNCTIONS = {
    "simd_sum(a[i])": X.sum(1, keepdims=True),
    "simd_max(a[i])": X.max(1, keepdims=True),
    "simd_min(a[i])": X.min(1, keepdims=True),
    "simd_product(0.001f * a[i] + 1.0f)": np.prod(0.001 * X + 1, 1, keepdims=True),
    "float(simd_xor(uint(a[i])))": np.bitwise_xor.reduce(X.astype(int), 1, keepdims=True),
    "float(simd_all(a[i] >= 0) + 2 * simd_any(a[i] < 0))": np.ones((2, 1)),
    "simd_shuffle(a[i], ushort(31 - lane))": X[:, ::-1],
    "simd_shuffle_xor(a[i], 5)": X[:, LANES ^ 5],
    "simd_shuffle_up(a[i], 3)": np.where(LANES < 3, X, np.roll(X, 3, 1)),
    "simd_shuffle_down(a[i], 4)": np.where(LANES > 27, X, np.roll(X, -4, 1)),
    "simd_shuffle_rotate_up(a[i], 3)": np.roll(X, 3, 1),
    "simd_broadcast(a[i], 7)": X[:, 7:8],
    "quad_shuffle_xor(a[i], 3)": X[:, LANES ^ 3],
    "quad_broadcast(a[i], 2)": X[:, LANES // 4 * 4 + 2],
    "simd_prefix_inclusive_sum(a[i])": np.cumsum(X, 1),
    "simd_prefix_exclusive_sum(a[i])": np.cumsum(X, 1) - X,
    "dot(simd_sum(float2(a[i], 1)), float2(1, 0))": X.sum(1, keepdims=True),
}


def simd_functions():
    """The results of all of them, one row each."""
    rows = [f"out[{64 * k} + i] = {each};\n" for k, each in enumerate(SIMD_FUNCTIONS)]
    return run(START + "".join(rows), [mx.array(X.reshape(-1))], shape=(len(rows), 2, 32))


def test_simd_functions(everywhere):
    for (name, expected), result in zip(SIMD_FUNCTIONS.items(), simd_functions()):
        np.testing.assert_allclose(
            result, np.broadcast_to(expected, X.shape), rtol=1e-5, err_msg=name
        )


def test_lanes_that_are_not_there_take_no_part(everywhere):
    source = START + "if (i == 3) return;\n out[i] = simd_sum(a[i]);"
    result = run(source, grid=(40, 1, 1), shape=(40,), init_value=-1)
    assert result[3] == -1 and result[0] == 31 * 16 - 3 and result[39] == sum(range(32, 40))


def test_simdgroups_may_take_different_branches(everywhere):
    source = f"""threadgroup float s[2];
    if (i / 32 == 1) {{ float x = simd_sum(a[i]); if (lane == 0) s[1] = x; }}
    else if (lane == 0) s[0] = 5;
    {BARRIER} out[i] = s[0] + s[1];"""
    assert (run(START + source) == 5 + sum(range(32, 64))).all()


def test_half_precision_is_rounded_at_each_step(everywhere):
    result = run(START + "half x = half(a[i]) * 0.1h; half y = x + 1000.0h; out[i] = y;")
    x = np.arange(64).astype(np.float16) * np.float16(0.1)
    assert (result == (x + np.float16(1000)).astype(np.float32)).all()


def test_bfloat(everywhere):
    b = (mx.arange(64) / 7).astype(mx.bfloat16)
    result = run(START + "float x = a[i] * 3.0f; out[i] = bfloat(x);", [b], dtype=mx.bfloat16)
    expected = (b.astype(mx.float32) * 3).astype(mx.bfloat16).astype(mx.float32)
    assert (result == np.array(expected)).all()


def test_literals_are_float(everywhere):
    assert (run(START + "auto x = 0.1; out[i] = sizeof(x) + (x == 0.1f) + a[i] * 0;") == 5).all()


def test_vectors(everywhere):
    source = """if (i < 16) {
      float4 v = ((const device float4*)a)[i];
      float4 w = float4(v.zw, half2(1, 2));
      w.xy += v.wz;
      uint4 bits = as_type<uint4>(w);
      out[4 * i] = dot(v, as_type<float4>(bits)) + vec<float, 2>(1, 2).y + max(v, w).x;
    }"""
    result = run(START + source, init_value=0)
    v = np.arange(64).reshape(16, 4).astype(np.float32)
    w = np.stack([v[:, 2] + v[:, 3], v[:, 3] + v[:, 2], v[:, 0] * 0 + 1, v[:, 0] * 0 + 2], 1)
    expected = (v * w).sum(1) + 2 + np.maximum(v, w)[:, 0]
    np.testing.assert_allclose(result[::4], expected, rtol=1e-6)


def test_integers(everywhere):
    source = """uint x = 0xABCD1234u;
    out[i] = float(extract_bits(x, i % 28, 4)) + 100.0f * float(popcount(x)) +
        10000.0f * float(ctz(1u << (i % 32)) + clz(1u << (i % 32))) + a[i] * 0;"""
    x = 0xABCD1234
    expected = [(x >> i % 28 & 15) + 100 * bin(x).count("1") + 310000 for i in range(64)]
    assert (run(START + source) == expected).all()


def test_helpers_tables_and_address_spaces(everywhere):
    header = """
    constant float table[4] = {1, 2, 4, 8};
    struct Pair { float first, second; };
    template <typename T> METAL_FUNC float load(const device T* p, uint k) { return p[k]; }
    template <typename T> METAL_FUNC float load(threadgroup const T* p, uint k) {
      return p[k] + 0.5f;
    }
    METAL_FUNC void swap(thread Pair& p) { float t = p.first; p.first = p.second; p.second = t; }
    """
    source = f"""threadgroup half s[64]; s[i] = half(load(a, i)); {BARRIER}
    Pair p = {{load(s, 63 - i), table[i % 4]}}; swap(p); out[i] = p.first * 100.0f + p.second;"""
    i = np.arange(64)
    assert (run(START + source, header=header) == 100 * 2.0 ** (i % 4) + 63.5 - i).all()


def test_small_inputs_are_constant(everywhere):
    header = "METAL_FUNC float pick(const device float* levels, uint k) { return levels[k]; }\n"
    source = START + "out[i] = pick(b, i & 3) + a[i];"
    assert run(source, [A, mx.arange(8).astype(mx.float32)], header=header)[5] == 6
    with pytest.raises(emulator.EmulatorError, match="no matching function"):
        run(source, [A, mx.arange(4).astype(mx.float32)], header=header)


def test_scalars_are_references(everywhere):
    source = START + "T scale = T(b); out[i] = a[i] * scale + N + (FLAG ? a_ndim * a_shape[0] : 0);"
    result = run(source, [A, mx.array(3)], template=[("T", mx.float32), ("N", 5), ("FLAG", True)])
    assert (result == np.arange(64) * 3 + 5 + 64).all()


def test_strides(everywhere):
    whole = mx.arange(48).reshape(4, 12).astype(mx.float32)
    view = whole[:, 2:8].T
    source = START + "out[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];"
    options = dict(grid=(24, 1, 1), shape=(24,), ensure_row_contiguous=False)
    assert (run(source, [view], **options) == np.array(view).reshape(-1)).all()
    plain = START + "out[i] = a[i];"
    options["ensure_row_contiguous"] = True
    assert (run(plain, [view], **options) == np.array(view).reshape(-1)).all()


def test_several_outputs_and_positions(everywhere):
    source = """uint3 p = thread_position_in_grid;
    uint k = p.x + 10 * p.y;
    uint3 group = threadgroup_position_in_grid, threads = threads_per_threadgroup;
    sizes[k] = threads.x * 100 + threads.y * 10 + simdgroups_per_threadgroup;
    groups[k] = half(group.x + 10 * group.y) + x[0];"""
    kernel = mx.fast.metal_kernel("t", ["x"], ["sizes", "groups"], source)
    sizes, groups = kernel(
        inputs=[mx.zeros(9, mx.float16)],
        grid=(10, 3, 1),
        threadgroup=(4, 2, 1),
        output_shapes=[(3, 10), (3, 10)],
        output_dtypes=[mx.int32, mx.float16],
    )
    # Threadgroups at the edges are smaller.
    assert sizes[0, 0].item() == 421 and sizes[0, 9].item() == 221
    assert sizes[2, 0].item() == 411 and sizes[2, 9].item() == 211
    assert groups.dtype == mx.float16 and groups[2, 9].item() == 12


def test_empty_arrays(everywhere):
    source = START + "out[i] = a[i] + b_shape[1] + (b_shape[1] > 0 ? b[i] : 0);"
    for contiguous in (True, False):
        result = run(source, [A, mx.zeros((2, 0, 16))], ensure_row_contiguous=contiguous)
        assert (result == np.arange(64)).all()
    assert run(START + "if (i > 63) out[i] = a[i];", shape=(0,)).size == 0


def test_bytes_of_a_word_belong_to_different_threads(everywhere):
    source = f"""((device uchar*)out)[i] = uchar(a[i]);
    threadgroup ushort2 s[32]; s[i / 2][i % 2] = ushort(i); {BARRIER}
    if (s[i / 2].x != i / 2 * 2) out[0] = 0;"""
    result = run(START + source, shape=(16,), dtype=mx.uint32)
    assert (result.view(np.uint8) == np.arange(64)).all()


DECODE = f"""
    uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    uint head = threadgroup_position_in_grid.y, i = thread_index_in_threadgroup;
    threadgroup float outs[8 * D], tops[8], totals[8];
    float4 query = ((const device float4*)(a + head * D))[lane], sum = float4(0);
    float top = -INFINITY, total = 0;
    for (uint t = simdgroup; t < T; t += 8) {{
      float4 key = float4(((const device half4*)(b + (head * T + t) * D))[lane]);
      float score = simd_sum(dot(query, key)), new_top = max(top, score);
      float shrink = exp(top - new_top), weight = exp(score - new_top);
      sum = sum * shrink + weight * float4(((const device half4*)(c + (head * T + t) * D))[lane]);
      total = total * shrink + weight; top = new_top;
    }}
    if (lane == 0) {{ tops[simdgroup] = top; totals[simdgroup] = total; }}
    for (uint d = 0; d < 4; d++) outs[simdgroup * D + lane * 4 + d] = sum[d];
    {BARRIER}
    if (i < D) {{
      float best = -INFINITY, whole = 0, value = 0;
      for (uint g = 0; g < 8; g++) best = max(best, tops[g]);
      for (uint g = 0; g < 8; g++) {{
        float weight = exp(tops[g] - best);
        whole += totals[g] * weight; value += outs[g * D + i] * weight;
      }}
      out[head * D + i] = value / whole;
    }}"""


def decode(T=512, H=4, D=128):
    """Results of attention of one query per head, and what they should be."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(H, D)).astype(np.float32)
    keys, values = (rng.normal(size=(H, T, D)).astype(np.float16) for _ in range(2))
    result = run(
        DECODE,
        [mx.array(query), mx.array(keys / 8), mx.array(values)],
        grid=(256, H, 1),
        group=(256, 1, 1),
        shape=(H, D),
        template=[("D", D), ("T", T)],
    )
    scores = np.einsum("hd,htd->ht", query, (keys / 8).astype(np.float32))
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return result, np.einsum("ht,htd->hd", weights, values.astype(np.float32))


def test_attention(everywhere):
    result, expected = decode()
    np.testing.assert_allclose(result, expected, atol=1e-5)


# ---------------------------------------------------------------------------- faults

NOT_METAL = {
    "constant as device": (
        "no matching function",
        "float x = h(b); out[i] = x;",
        "METAL_FUNC float h(const device float* p) { return p[0]; }\n",
    ),
    "threadgroup as device": (
        "cannot initialize",
        "threadgroup float s[64]; s[i] = a[i]; device float* p = s; out[i] = p[0];",
    ),
    "cast between spaces": ("between address", "out[i] = ((const thread float*)a)[i];"),
    "pointer without a space": ("no address space", "float t[4]; float* p = t; out[i] = p[0];"),
    "reference without a space": (
        "no address space",
        "out[i] = h(a[i]);",
        "METAL_FUNC float h(float x) { float& r = x; return r; }\n",
    ),
    "variable outside of a function": ("lies outside", "out[i] = total++;", "float total = 0;\n"),
    "write of an input": ("read-only", "a[i] = 1; out[i] = 0;"),
    "double": ("poisoned", "double x = a[i]; out[i] = x;"),
    "max of mixed types": ("no matching function", "out[i] = max(a[i], 0);"),
    "64 bits in a simd function": ("64 bits", "ulong k = i; out[i] = simd_sum(k);"),
    "unknown attribute": ("undeclared", "out[i] = thread_index_in_warp;"),
    "implicit bfloat": ("bfloat takes no float", "bfloat x = a[i]; out[i] = x;"),
    "threadgroup variable with a value": (
        "address space",
        "threadgroup float x = 0; out[i] = x + a[i];",
    ),
    "too few elements": ("wrong number", "float4 x = float4(a[i], 1.0f); out[i] = x.x;"),
}


@pytest.mark.parametrize("name", NOT_METAL)
def test_what_is_not_metal(name):
    match, source, *header = NOT_METAL[name]
    with emulator.patch(), pytest.raises(emulator.EmulatorError, match=match):
        run(START + source, [A, mx.array([1.0, 2.0])], header="".join(header))


S = "threadgroup float s[64]; s[i] = a[i];\n"
TWO_GROUPS = dict(grid=(64, 1, 1), group=(32, 1, 1))
# Those with True are noticed by the mode "fast" too.
FAULTS = {
    "no barrier": ("race|uninit", False, S + "out[i] = s[63 - i];"),
    "no barrier in a simdgroup": ("race|uninit", False, S + "out[i] = s[i ^ 1];"),
    "barrier for other memory": (
        "race: a write and then a read",
        False,
        S + "threadgroup_barrier(mem_flags::mem_device); out[i] = s[63 - i];",
    ),
    "barrier of the simdgroup only": (
        "race|uninit",
        False,
        S + "simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[63 - i];",
    ),
    "write after read": (
        "race: a (read|write) and then a (read|write)",
        False,
        S + f"{BARRIER} float x = s[63 - i]; s[i] = x; out[i] = x;",
    ),
    "two threadgroups write": (
        "race: two writes",
        False,
        "out[i % 32] = a[i];",
        TWO_GROUPS,
        dict(shape=(32,)),
    ),
    "a threadgroup reads another's output": (
        "race|uninit",
        False,
        "out[i] = a[i]; if (i == 32) out[i] = out[0]; if (i == 0) out[i] = out[32];",
        TWO_GROUPS,
    ),
    "sum without atomics": ("race", False, "out[0] += a[i];", dict(shape=(1,), init_value=0)),
    "read behind the end": ("out of bounds", True, "out[i] = a[i + 1];"),
    "write behind the end": ("out of bounds", True, "out[i + 1] = a[i];"),
    "read before the start": ("out of bounds.*reads", False, "out[i] = a[int(i) - 1];"),
    "unsigned index below zero": ("out of bounds", True, "out[i] = a[i - 1u];"),
    "shape read too far": ("out of bounds.*a_shape", False, "out[i] = a[0] + a_shape[i / 63];"),
    "threadgroup array too short": (
        "index outside|out of bounds",
        False,
        "threadgroup float s[32]; s[i] = a[i]; out[i] = 0;",
    ),
    "into the neighbouring threadgroup array": (
        "out of bounds.* s",
        False,
        """threadgroup float s[32], u[64]; u[i] = 0;
        threadgroup float* p = s; p[i] = 1; out[i] = u[i];""",
    ),
    "thread array too short": (
        "index outside",
        False,
        "float t[4] = {0}; t[i % 5] = a[i]; out[i] = t[0];",
    ),
    "thread array left by a pointer": (
        "index outside",
        False,
        "float t[4] = {0}; thread float* p = t; p[i % 5] = a[i]; out[i] = p[i % 3];",
    ),
    "bits that are not there": (
        "undefined: extract_bits",
        True,
        "out[i] = float(extract_bits(uint(a[i]), i, 4));",
    ),
    "hole in threadgroup memory": (
        "uninitialized.* s",
        False,
        f"threadgroup float s[64]; if (i != 3) s[i] = a[i]; {BARRIER} out[i] = s[63 - i];",
    ),
    "threadgroup memory of another threadgroup": (
        "uninitialized.* s",
        False,
        f"threadgroup float s[1]; if (i == 0) s[0] = 1; {BARRIER} out[i] = s[0];",
        TWO_GROUPS,
    ),
    "output read first": ("uninitialized.* out", False, "out[i] += a[i];"),
    "output not written": (r"unwritten.* out\[5\]", False, "if (i != 5) out[i] = a[i];"),
    "barrier in a branch": ("divergence", True, S + f"if (i < 32) {BARRIER} out[i] = a[i];"),
    "two barriers for one": (
        "divergence",
        True,
        f"if (i < 32)\n{BARRIER}\nelse\n{BARRIER}\nout[i] = a[i];",
    ),
    "return before a barrier": (
        "divergence.*has returned",
        True,
        f"if (i == 7) return;\n{BARRIER} out[i] = a[i];",
        dict(init_value=0),
    ),
    "simd function in a branch": (
        "divergence",
        True,
        "float x = a[i]; if (lane < 8) x = simd_sum(x);\nout[i] = simd_max(x);",
    ),
    "simd function in an uneven loop": (
        "divergence",
        True,
        """float x = 0;
        for (uint k = lane; k < 40; k += 32) x += simd_sum(a[k]);
        out[i] = simd_max(x);""",
    ),
    "endless loop": ("hang", True, "volatile int k = 1; while (k) {} out[i] = a[i];"),
    "endless barriers": ("hang", True, f"volatile int k = 1; while (k) {BARRIER} out[i] = a[i];"),
    "too much threadgroup memory": (
        "limit.*36000 bytes",
        True,
        "threadgroup float s[9000]; s[i] = a[i]; out[i] = s[i];",
    ),
    "too many threads": (
        "limit.*2048 threads",
        True,
        "out[i] = a[0];",
        dict(grid=(2048, 1, 1), shape=(2048,)),
    ),
    "thread memory too large": (
        "limit.*stack",
        True,
        "volatile float t[99999]; for (int k = 0; k < 99999; k++) t[k] = a[i]; out[i] = t[i];",
    ),
    "shift too far": ("undefined.*shift", False, "out[i] = float(uint(a[i] + 1) << (i + 1));"),
    "float beyond an integer": ("undefined.*float", False, "out[i] = float(uint(a[i] - 1));"),
    "division by zero": ("undefined.*zero", True, "out[i] = float(7 / int(a[i]));"),
    "shuffle from nowhere": (
        "undefined.*simd_shuffle",
        True,
        "out[i] = simd_shuffle(a[i], ushort(lane + 1));",
    ),
    "broadcast of many": (
        "undefined.*simd_broadcast",
        True,
        "out[i] = simd_broadcast(a[i], ushort(lane & 1));",
    ),
    "misaligned": (
        "misaligned",
        False,
        "if (i < 15) out[i] = (*(const device float4*)(a + 4 * i + 1)).x;",
        dict(init_value=0),
    ),
}


def options_of(fault):
    return {key: value for more in FAULTS[fault][3:] for key, value in more.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    match, also_fast, source, *_ = FAULTS[fault]
    for schedule in (0, 1, 2):
        checked = emulator.patch("checked", schedule=schedule, seconds=0.1)
        with checked, pytest.raises(emulator.EmulatorError, match=match):
            run(START + source, **options_of(fault))
    if also_fast:
        fast = emulator.patch("fast", seconds=0.1)
        with fast, pytest.raises(emulator.EmulatorError, match=match):
            run(START + source, **options_of(fault))


def test_a_simd_function_orders_no_memory():
    source = START + S + "float zero = simd_sum(0.0f); out[i] = s[i ^ 1] + zero;"
    with emulator.patch(), pytest.raises(emulator.EmulatorError, match="race"):
        run(source)


def test_messages_quote_the_line():
    with emulator.patch(), pytest.raises(emulator.EmulatorError) as caught:
        run(START + "float x = 1;\nout[i] = x + a[i + 1]; // here\n")
    assert "a[64] (of 64 elements)" in str(caught.value)
    if shutil.which("llvm-symbolizer") or shutil.which("addr2line"):
        assert "`out[i] = x + a[i + 1]; // here`" in str(caught.value)


def test_schedules_differ():
    source = START + S + "out[i] = i < 32 ? s[i] : s[63 - i];"

    def results(**settings):
        with emulator.patch("fast", **settings):
            return run(source).tobytes()

    ascending = results(schedule=0)
    assert ascending == results(schedule=0)
    assert ascending != results(schedule=1)
    racy = START + "out[0] = a[i];"
    last = set()
    for schedule in range(8):
        with emulator.patch("fast", schedule=schedule):
            last.add(run(racy, shape=(1,), grid=(64, 1, 1), group=(32, 1, 1))[0])
    assert len(last) > 3


def test_poisons_differ():
    source = START + "threadgroup float s[64]; out[i] = s[i] + a[i];"
    results = []
    for poison in range(len(emulator.POISONS)):
        with emulator.patch("fast", poison=poison):
            results.append(run(source)[0])
    assert np.isnan(results[0]) and results[1] > 1e15 and results[2] == 0


# ---------------------------------------------------------------------------- patch()


def test_patch_is_undone():
    before = (mx.fast.metal_kernel, mx.metal.is_available)
    with emulator.patch():
        assert mx.metal.is_available()
        with pytest.raises(emulator.EmulatorError):
            run(START + "out[i + 1] = a[i];")
    assert (mx.fast.metal_kernel, mx.metal.is_available) == before
    traced = []

    def function(x):
        traced.append(type(x))
        return x + 1

    compiled = mx.compile(function)
    compiled(A)
    compiled(A)
    assert len(traced) == 1  # mx.compile works again


def test_patch_tells_what_it_takes():
    with pytest.raises(ValueError, match="'slow'"), emulator.patch("slow"):
        pass


def test_other_threads_may_launch():
    results = []

    def work():
        results.append(
            run(START + f"{S} {BARRIER} out[i] = s[63 - i];", [mx.arange(64).astype(mx.float32)])
        )

    with emulator.patch():
        thread = threading.Thread(target=work)
        thread.start()
        work()
        thread.join()
    assert len(results) == 2 and (results[0] == results[1]).all()


# ---------------------------------------------------------------------------- the prototype


@pytest.fixture(scope="module")
def prototype():
    if not PROTOTYPE.exists():
        pytest.skip("the other emulator is not here")
    sys.path.insert(0, str(PROTOTYPE))
    import metalemu

    metalemu.CACHE = str(Path(tempfile.gettempdir()) / "metalemu-cache")
    yield metalemu
    sys.path.remove(str(PROTOTYPE))


def test_the_prototype_finds_the_same_faults(prototype):
    missed = set()
    for fault, (_, _, source, *_) in FAULTS.items():
        with prototype.patch(mode="checked", timeout_ms=200):
            try:
                run(START + source, **options_of(fault))
                missed.add(fault)
            except prototype.EmuError:
                pass
    assert missed == {"thread array left by a pointer"}


def test_the_prototype_computes_the_same(prototype):
    results = []
    for each in (emulator, prototype):
        with each.patch():
            results.append((simd_functions(), decode(T=100)[0]))
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

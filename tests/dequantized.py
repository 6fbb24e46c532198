"""The kernel that dequantizes, and what prompts do with it, against MLX's operations."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from layouts import layout
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_turboquant_plugin.attention import dequantized, dispatch
from mlx_turboquant_plugin.attention.layout import layout_of
from mlx_turboquant_plugin.backends import backend, support
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from mlx_turboquant_plugin.codecs.key_bias import KeyBias
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS = 2
SEGMENTED = ("segmented", 4)


@dataclass(frozen=True)
class Case:
    """A cache that takes chunks of so many tokens.

    Attributes:
        dim, value_dim: head dims.
        keys, values: codec and bits.
        chunks: what comes one after the other; the last is the pass that is looked at.
        rope: None for no key bias and no balance, or the layout of the rotary pairs. With them,
            the channels of segmented keys are sorted.
        ring: ``max_kv_size``, or 0.
        left, right: zeros around.
        sinks: how many first tokens stay in full precision.
        trim: tokens that are trimmed before the last chunk.
        strided: whether new tokens are a view of an array with heads inside.
    """

    dim: int = 64
    value_dim: int = 64
    keys: tuple[str, int] = ("lloyd-max", 4)
    values: tuple[str, int] = ("lloyd-max", 3)
    dtype: str = "float32"
    chunks: tuple[int, ...] = (150, 100)
    batch: int = 1
    rope: str = ""
    ring: int = 0
    left: int = 0
    right: int = 0
    invariant: bool = False
    sinks: int = 4
    trim: int = 0
    strided: bool = False


CASES = [
    Case(),
    Case(128, 128, dtype="float16", strided=True),
    Case(80, 96, ("lloyd-max", 3), ("lloyd-max", 4), rope="traditional"),
    Case(40, 32, ("lloyd-max", 2), ("lloyd-max", 2), "bfloat16", left=3, right=70),
    Case(256, 256, ("affine", 4), ("affine", 4), rope="halves"),
    Case(112, 64, ("affine", 3), ("affine", 3), batch=2),
    Case(64, 112, ("affine", 8), ("affine", 2)),
    Case(96, 128, ("affine", 2), ("affine", 8), rope="partial", chunks=(40, 200, 1)),
    Case(keys=SEGMENTED, rope="halves", values=("lloyd-max", 4)),
    Case(80, 96, SEGMENTED, ("affine", 4), rope="traditional", batch=2, chunks=(97, 33, 61)),
    Case(128, 128, SEGMENTED, dtype="float16", rope="partial", chunks=(300, 20), trim=151),
    Case(32, 256, SEGMENTED, dtype="bfloat16", rope="halves", left=3, right=70),
    Case(256, 40, SEGMENTED),
    # Latents, with what is beside them, and the full layers of Gemma 4.
    Case(512, 64, values=("affine", 8), rope="halves", chunks=(150, 70)),
    Case(512, 512, SEGMENTED, ("lloyd-max", 4), dtype="bfloat16", chunks=(150, 70)),
    # As much memory of a threadgroup as there can be.
    Case(512, 48, values=("lloyd-max", 4), chunks=(150, 70)),
    Case(48, 512, SEGMENTED, ("lloyd-max", 4), chunks=(150, 70)),
    Case(rope="halves", dtype="bfloat16", chunks=(97, 33, 61), strided=True),
    Case(rope="partial", invariant=True, chunks=(97, 150), left=60),
    Case(chunks=(200, 9), ring=120),
    Case(chunks=(200, 40), ring=170, strided=True),
    Case(chunks=(30, 20)),
    Case(chunks=(2, 1)),
    Case(chunks=(300, 1, 1, 1)),
    Case(chunks=(200, 40), sinks=70),
    Case(chunks=(300, 20), trim=151),
    Case(128, 128, ("affine", 2), ("affine", 3), chunks=(300, 20), trim=297, sinks=0),
    Case(chunks=(300, 20), trim=297, sinks=0),
]


def random(case: Case, count: int):
    """Keys and values of ``count`` tokens, of many lengths."""
    for dim in (case.dim, case.value_dim):
        shape = (case.batch, count, HEADS, dim) if case.strided else (case.batch, HEADS, count, dim)
        x = mx.exp(mx.random.normal((*shape[:-1], 1))) * mx.random.normal(shape)
        x = x.astype(getattr(mx, case.dtype))
        yield x.swapaxes(1, 2) if case.strided else x


def codec_of(case: Case) -> KVCodec:
    """The codec of a case, the same each time."""
    mx.random.seed(case.dim)
    balance = bias = cut = None
    if case.rope:
        balance = mx.exp(0.3 * mx.random.normal((HEADS, 1, case.dim)))
        rotary = case.dim // 2 if case.rope == "partial" else case.dim
        rope = nn.RoPE(rotary, traditional=case.rope == "traditional")
        bias = KeyBias(10 * mx.random.normal((HEADS, case.dim)), rope)
        if case.keys == SEGMENTED:
            cut = layout(HEADS, case.dim)
    spec = CodecSpec(case.dim, case.value_dim, *case.keys, *case.values)
    return KVCodec(spec, balance, bias, cut)


def view_of(case: Case, kernel: str):
    """What the last chunk's queries see."""
    codec, visibility = codec_of(case), Visibility(32, case.sinks, case.invariant)
    cache = CompressedKVCache(codec, visibility)
    if case.ring:
        cache = RotatingCompressedKVCache(case.ring, 4, codec, visibility)
    for index, count in enumerate(case.chunks):
        if index == len(case.chunks) - 1:
            cache.trim(case.trim)
        view = cache.append(*random(case, count))
    return view._replace(backend=backend(kernel))


def check(case: Case, kernel: str) -> None:
    """Assert that the kernel and MLX's operations lay out the same tokens."""
    view = view_of(case, kernel)
    layout = layout_of(view)
    total = case.left + layout.total + case.right
    layout = layout._replace(left=case.left, total=total)
    slot = view.plan.slot(layout.full.start)
    ours = dequantized._laid_out(view, layout, slot)
    by_operations = view_of(case, "eager")
    expected = dequantized._laid_out(by_operations, layout, slot)
    for side in "keys", "values":
        joined = (getattr(one.full_tokens, side) for one in (view, by_operations))
        assert mx.array_equal(*joined)
    places = layout.positions()
    for x, y in zip(ours, expected):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = (np.array(a.astype(mx.float32)) for a in (x, y))
        assert not x[:, :, places < 0].any()
        is_full = ~layout.codes()
        np.testing.assert_array_equal(x[:, :, is_full], y[:, :, is_full])
        assert_close(x, y, case.dtype)
    check_arrays(case, kernel)


def check_arrays(case: Case, kernel: str) -> None:
    """Assert that an attention that computes with arrays gets the same from the kernel."""
    view = view_of(case, kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "on_gpu", lambda: True)
        ours = view.apart.keys_and_values()
    for x, y in zip(ours, view.keys_and_values()):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert_close(*(np.array(a.astype(mx.float32)) for a in (x, y)), case.dtype)


def assert_close(x: np.ndarray, y: np.ndarray, dtype: str) -> None:
    roundoff = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(x, y, atol=roundoff * np.abs(y).max(), rtol=0)


# Chunks of a sequence: prompts, steps, prompts that begin where the first code is needed
# (96), or where another is (160), and short ones.
PASSES = [
    ((20, 100, 64, 1, 1, 33, 17, 128, 40), {}),
    ((96, 64, 40, 1, 31, 17), {"rope": "halves", "strided": True}),
    ((95, 1, 64, 300), {"dim": 80, "value_dim": 96, "rope": "partial"}),
    ((97, 150, 9, 55), {"batch": 2, "dtype": "bfloat16"}),
    ((95, 1, 64, 40), {"keys": SEGMENTED, "rope": "halves", "strided": True}),
    ((97, 33, 100), {"dim": 80, "keys": SEGMENTED, "rope": "partial", "batch": 2}),
    ((150, 40), {"keys": SEGMENTED}),
]


def check_passes(chunks, settings, kernel, monkeypatch):
    """Assert that prompts by a fused kernel come to what they do by operations, chunk by chunk."""
    case = Case(**settings)
    outs = []
    for name, gpu in (("eager", False), (kernel, True)):
        monkeypatch.setattr(support, "on_gpu", lambda gpu=gpu: gpu)
        codec = codec_of(case)
        cache = CompressedKVCache(codec, Visibility(64, 4), name)
        # At others a vector's size may be on a tie, which rounding decides.
        mx.random.seed(8)
        for count in chunks:
            keys, values = random(case, count)
            queries = mx.random.normal((case.batch, 2 * HEADS, count, case.dim)).astype(keys.dtype)
            cache.attending = True
            new = cache.update_and_fetch(keys, values)
            mask = cache.make_mask(count, return_array=False, window_size=None)
            out = dispatch.attend(
                scaled_dot_product_attention, queries, *new, cache, case.dim**-0.5, mask
            )
            mx.eval(out, cache.state)
            outs.append(np.array(out.astype(mx.float32)))
    half = len(chunks)
    roundoff = {"float32": 1e-4, "bfloat16": 4e-2}[case.dtype]
    for ours, expected in zip(outs[half:], outs[:half]):
        np.testing.assert_allclose(ours, expected, atol=roundoff * np.abs(expected).max(), rtol=0)


def check_short_rows(kernel, monkeypatch):
    """Assert that a row with few tokens in a batch's pass keeps what it was given."""
    case = Case()
    for before, count in ((187, 10), (96, 5), (200, 12), (300, 16)):
        rows = []
        for name, gpu in (("eager", False), (kernel, True)):
            monkeypatch.setattr(support, "on_gpu", lambda gpu=gpu: gpu)
            cache = CompressedKVCache(codec_of(case), Visibility(64, 4), name)
            mx.random.seed(before)
            cache.append(*random(case, before))
            cache.append(*random(case, count), is_prompt=True)
            cache.append(*random(case, 40))
            rows.append(cache)
        ours, expected = (row.keys_and_values() for row in rows[::-1])
        for x, y in zip(ours, expected):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=1e-3)

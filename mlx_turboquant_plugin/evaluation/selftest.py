"""``mlx_turboquant selftest``: every kernel of this device against NumPy in fp64.

In the manner of llama.cpp's test-backend-ops: a table of shapes, codecs and dtypes, one
line each. A case fills real caches, and lets mlx-lm's patched attention answer. The
expected result is computed from the codes that the caches hold, by what ``reference.py``
says they mean, so that it judges attention and not the loss of the codecs. The codes are
judged apart: no vector may lose much more in them than in those of ``reference.py``.

What counts as an error is derived and not tuned. With unit roundoffs u of fp32 and U of
the model's dtype, S the largest |score| and V the largest |value|, an output may be off by

    U max|out| + u V (64 + S (sqrt(D) + 18))

- U max|out|: the result is rounded once, at the end.
- S sqrt(D) u: the error of a score, a sum of D products whose rounding errors add up like
  a random walk (Higham and Mary 2019). An error d of the scores changes weights by a
  factor e^d, and a mean of values by at most d V.
- 18 S u: sizes of vectors are powers of two from ``fast::exp2``, for which Metal allows
  3 + 2 |x| units in the last place; here |x| <= 3. CUDA allows less.
- 64 u V: weights are such powers, too, for a mean |x| of 8; sums and the quotient.

MLX multiplies fp32 matrices in TF32 on a GPU; the eager and the compiled kernel do so,
and there u is 2^-11 for them.

The CUDA kernel for Lloyd-Max codes multiplies whole numbers: channels of rotated queries,
and the weights of codes, are off by up to w = 2^-16 of the largest of the vector or of 64
tokens. That adds

    w V (2 + S)

- S w: sqrt(D) errors of up to w max|q|, times those of a key's channels, add up to
  w max|q| |k|; and max|q| is about 4 |q| / sqrt(D), as S is about 4 |q| |k| / sqrt(D).
- 2 w V: 64 errors of up to w times the largest weight, times values of about V / 4.

Codes are not compared: by rounding one can fall to the other side of a threshold, and a
size, with all codes of its vector, to the other side of a tie. That costs little, so
what a vector x loses, by the measure that the codec minimises, may be

    1.2 (what it loses in the codes of reference.py) + sqrt(1 + ALONG) (u (64 |x| + t |b|) + 4 U |x|)

- 64 u |x|: the rotation, and sizes that are powers of two.
- u t |b|: angles up to t are rounded, and turn the bias b that is taken away from keys.
- 4 U |x|: only where MLX rotates vectors by a matrix in TF32, U = 2^-11: on a GPU for all
  kernels but the fused ones, which rotate by themselves.
"""

import argparse
import sys
import zlib
from dataclasses import dataclass
from itertools import cycle, product
from typing import Iterator, NamedTuple, Tuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention

from .. import compiling, reference
from ..attention.dispatch import attend
from ..attention.fused import MAX_QUERIES, fallbacks
from ..attention.kernels import available_kernels, resolve_kernel
from ..cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import Codes, CodecSpec, KVCodec
from ..kernels import FUSED, fused_kernels
from . import stored

VISIBILITY = Visibility(window=64, sinks=4)
KV_HEADS = 2
# Queries this large make some weights large and many small, as those of models are.
QUERY_SIZE = 3.0
BIAS_SIZE = 20.0

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TF32_ROUNDOFF = 2.0**-11
CUDA_ROUNDOFF = 2.0**-16

# Tokens of a sequence whose codes are judged.
SAMPLE = 128


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        dim: D, of the keys; ``value_dim`` of the values.
        groups: query heads for each KV head.
        count: N, the number of queries.
        lengths: tokens of each sequence, the queries' included; several are a batch.
        keys, values: "lloyd-max" or "affine", and bits.
        extras: with a key bias and balanced keys; ``rope`` is how positions are encoded:
            "halves", "traditional" or "partial".
        ring: the ``max_kv_size`` of a cache that forgets, or 0.
        steps: how many of the tokens come one by one before the queries, as in decoding.
    """

    dim: int = 128
    value_dim: int = 128
    groups: int = 4
    count: int = 1
    lengths: Tuple[int, ...] = (333,)
    keys: Tuple[str, int] = ("lloyd-max", 4)
    values: Tuple[str, int] = ("lloyd-max", 3)
    dtype: str = "float32"
    extras: bool = False
    rope: str = "halves"
    ring: int = 0
    steps: int = 0

    def __str__(self):
        dims = str(self.dim) if self.dim == self.value_dim else f"{self.dim}/{self.value_dim}"
        codecs = "".join(
            f" {side}{bits}{'a' if codec == 'affine' else ''}"
            for side, (codec, bits) in (("K", self.keys), ("V", self.values))
        )
        lengths = ",".join(map(str, self.lengths))
        text = f"D={dims} GQA={self.groups} N={self.count} T={lengths}{codecs} {self.dtype}"
        text += " bias," + self.rope if self.extras else ""
        text += f" ring={self.ring}" if self.ring else ""
        return text + (f" steps={self.steps}" if self.steps else "")


def case(dim: int = 128, **values) -> Case:
    """A case whose values have the dimension of its keys."""
    return Case(dim, **{"value_dim": dim, **values})


DIMS = (64, 80, 96, 112, 128, 256)
LLOYD_MAX = [(("lloyd-max", k), ("lloyd-max", v)) for k, v in product((2, 3, 4), repeat=2)]
AFFINE = [(("affine", bits), ("affine", bits)) for bits in (2, 3, 4, 8)]
MIXED = [(("lloyd-max", 3), ("affine", 4)), (("affine", 4), ("lloyd-max", 3))]

# Every branch of every kernel, in few enough cases for an emulator.
QUICK = (
    case(64, groups=1),
    case(64, groups=3, count=5, extras=True),
    case(80, groups=2, lengths=(300,), keys=("lloyd-max", 3), values=("lloyd-max", 2)),
    case(80, groups=8, count=2, extras=True, rope="traditional", dtype="float16"),
    case(96, groups=2, keys=("affine", 3), values=("affine", 3)),
    case(112, groups=5, keys=("lloyd-max", 2), values=("lloyd-max", 4), dtype="bfloat16"),
    case(128, groups=4, lengths=(700,), dtype="float16"),
    case(128, groups=8, keys=("lloyd-max", 3), values=("lloyd-max", 3), lengths=(1300,)),
    case(128, groups=1, lengths=(101,), keys=("affine", 4), values=("affine", 4)),
    case(128, groups=2, lengths=(5, 170, 333, 69), extras=True, rope="partial"),
    case(128, groups=6, count=8, lengths=(196,), keys=("lloyd-max", 2), values=("affine", 2)),
    case(256, groups=7, lengths=(260,), extras=True, dtype="bfloat16"),
    case(256, groups=1, keys=("affine", 8), values=("affine", 8)),
    case(256, groups=2, keys=("affine", 2), values=("lloyd-max", 4), lengths=(330, 290)),
    case(64, groups=2, lengths=(430,), extras=True, ring=263),
    Case(192, 128, groups=2, keys=("lloyd-max", 3), values=("lloyd-max", 2)),
    case(128, groups=4, steps=3, dtype="bfloat16"),
    case(64, groups=2, count=3, steps=2),
)


def table() -> Iterator[Case]:
    """All cases: dims with codecs, with groups, with dtypes and numbers of queries; lengths."""
    yield from QUICK
    groups, counts, dtypes = cycle((1, 2, 4, 8, 3)), cycle((1, 1, 2, 1, 4, 8)), cycle(DTYPES)
    for dim, (keys, values) in product(DIMS, (*LLOYD_MAX, *AFFINE, *MIXED)):
        yield case(
            dim,
            groups=next(groups),
            count=next(counts),
            keys=keys,
            values=values,
            dtype=next(dtypes),
            lengths=(427,),
        )
    for dim, group in product(DIMS, (*range(1, 9), 12, 16)):
        yield case(dim, groups=group, count=next(counts), lengths=(200,))
    for dim, dtype, count in product(DIMS, DTYPES, range(1, MAX_QUERIES + 1)):
        yield case(dim, groups=2, count=count, dtype=dtype, lengths=(270,), extras=count % 2 == 0)
    for length in (69, 97, 101, 129, 133, 161, 197, 228, 229, 230, 512, 1024, 2085, 4100, 16500):
        yield case(lengths=(length,))
        # With positions grow the angles, and what fp32 leaves unknown about a bias.
        extras = length < 4000
        yield case(64, groups=2, lengths=(length,), keys=("lloyd-max", 3), extras=extras)
    for lengths in ((4, 5), (69, 101, 333), (700, 37), (129,) * 5, tuple(range(100, 500, 50))):
        for dim in (80, 128):
            yield case(dim, lengths=lengths, groups=2, extras=len(lengths) == 3)
    for rope, dim in product(("halves", "traditional", "partial"), DIMS):
        yield case(dim, groups=2, extras=True, rope=rope, lengths=(500,))
    for ring, length in product((100, 150, 333), (99, 150, 640)):
        yield case(lengths=(length,), ring=ring, extras=ring == 333)
    for steps, lengths in product((1, 2, 36), ((300,), (190, 260))):
        yield case(lengths=lengths, groups=2, steps=steps, dtype=next(dtypes))
    # So many tokens that every part of a kernel has more than one turn.
    yield case(lengths=(40_000,))


class Result(NamedTuple):
    """What came of a case: ``note`` says why it failed, if not by its error."""

    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        # NaN is not.
        return not self.note and self.error <= self.tolerance


def check(tested: Case, kernel: str) -> Result:
    """Run one case with the kernel of the given name."""
    layer = _Layer(tested, kernel)
    before = fallbacks()
    try:
        out = np.array(layer.attend().astype(mx.float32))
    except Exception as error:  # A kernel may fail to compile: the others are still checked.
        return Result(np.inf, 0.0, f"{type(error).__name__}: {error}")
    note = "".join(message for message in fallbacks() if message not in before)
    excess = layer.excess()
    if not excess <= 1:
        note += f"codes lose {excess:.3g} times what they may"
    if not layer.holds_what_was_given():
        note += "exact tokens are not those that were given"
    expected, tolerance = layer.expected()
    error = np.abs(out - expected).max()
    return Result(float(error), tolerance, note)


class _Layer:
    """The caches, queries and new tokens of a case, and what attention should make of them."""

    def __init__(self, tested: Case, kernel: str):
        self.case, self.kernel = tested, kernel
        self.random = np.random.default_rng(zlib.crc32(str(tested).encode()))
        dim, rope = tested.dim, tested.rope
        rotary = dim // 2 if rope == "partial" else dim
        self.rope = {"traditional": rope == "traditional", "dims": rotary}
        self.bias = self.balance = None
        codec_parts = None, None
        if tested.extras:
            self.bias = BIAS_SIZE * self._normal(KV_HEADS, dim)
            self.balance = np.exp(0.3 * self._normal(KV_HEADS, 1, dim))
            rope_module = nn.RoPE(rotary, traditional=rope == "traditional")
            codec_parts = mx.array(self.balance), KeyBias(mx.array(self.bias), rope_module)
        spec = CodecSpec(dim, tested.value_dim, *tested.keys, *tested.values)
        self.codec = KVCodec(spec, *codec_parts)
        self.scale = dim**-0.5
        heads = KV_HEADS * tested.groups
        rows = len(tested.lengths)
        self.queries = self._array(QUERY_SIZE * self._normal(rows, heads, tested.count, dim))
        self.keys = [self._keys(length) for length in tested.lengths]
        self.values = [
            self._array(self._normal(1, KV_HEADS, length, tested.value_dim))
            for length in tested.lengths
        ]

    def _normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32)

    def _array(self, x: np.ndarray) -> mx.array:
        return mx.array(x.astype(np.float32)).astype(DTYPES[self.case.dtype])

    def _keys(self, length: int) -> mx.array:
        keys = self._normal(1, KV_HEADS, length, self.case.dim)
        return self._array(keys + self._rotated_bias(0, length))

    def _rotated_bias(self, start: int, stop: int):
        if self.bias is None:
            return 0.0
        bias = np.repeat(self.bias[:, None], stop - start, axis=1)
        return reference.rope(bias, np.arange(start, stop), **self.rope)

    def _cache(self) -> CompressedKVCache:
        parts = self.codec, VISIBILITY, self.kernel
        if self.case.ring:
            return RotatingCompressedKVCache(self.case.ring, VISIBILITY.sinks, *parts)
        return CompressedKVCache(*parts)

    def attend(self) -> mx.array:
        """What mlx-lm's patched attention gives, (B, H_q, N, D_v)."""
        caches = [self._cache() for _ in self.keys]
        last = self.case.count + self.case.steps
        for cache, keys, values in zip(caches, self.keys, self.values):
            # In two steps: the codes of the second do not begin at position 0.
            half, end = keys.shape[2] // 2, keys.shape[2] - last
            for part in (slice(0, half), slice(half, end)):
                if part.stop > part.start:
                    cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        cache = caches[0] if len(caches) == 1 else CompressedKVCache.merge(caches)
        for step in range(self.case.steps):
            self._step(cache, self.queries[:, :, :1], last - step)
        out = self._step(cache, self.queries, self.case.count)
        self.rows = [cache] if len(caches) == 1 else cache.rows
        return out

    def _step(self, cache: CompressedKVCache, queries: mx.array, before_end: int) -> mx.array:
        """What ``queries`` make of the tokens that begin so many before the end."""
        count = queries.shape[2]
        new = (
            mx.concatenate([x[:, :, x.shape[2] - before_end :][:, :, :count] for x in rows])
            for rows in (self.keys, self.values)
        )
        cache.attending = True
        keys, values = cache.update_and_fetch(*new)
        mask = None if count == 1 else "causal"
        out = attend(scaled_dot_product_attention, queries, keys, values, cache, self.scale, mask)
        mx.eval(out)
        return out

    def expected(self) -> Tuple[np.ndarray, float]:
        """The same in fp64, and how far off it may be."""
        outs, score, value = [], 0.0, 0.0
        for index, length in enumerate(self.case.lengths):
            queries = _fp64(self.queries[index : index + 1])
            keys, values, decoded_keys, decoded_values = self._row(index)
            positions = np.arange(length - self.case.count, length)
            outs.append(
                reference.attention(
                    queries,
                    keys,
                    values,
                    decoded_keys,
                    decoded_values,
                    positions,
                    VISIBILITY.window,
                    VISIBILITY.sinks,
                    self.scale,
                    seen=self._remembered(length),
                )
            )
            scores = queries @ np.repeat(keys, self.case.groups, axis=1).swapaxes(-1, -2)
            score = max(score, self.scale * np.abs(scores).max())
            value = max(value, np.abs(values).max())
        out = np.concatenate(outs)
        return out, self._tolerance(np.abs(out).max(), score, value)

    def holds_what_was_given(self) -> bool:
        """Whether the exact tokens of all caches are the sinks and the newest."""
        for index, row in enumerate(self.rows):
            slots = min(VISIBILITY.sinks, row.offset), row.exact_start
            for held, given in ((row.keys, self.keys[index]), (row.values, self.values[index])):
                expected = mx.concatenate([given[:, :, : slots[0]], given[:, :, slots[1] :]], axis=2)
                if not mx.array_equal(held, expected):
                    return False
        return True

    def excess(self) -> float:
        """What vectors lose in Lloyd-Max codes, as a share of what they may: the most."""
        shares = []
        balance = 1.0 if self.balance is None else self.balance
        for index, row in enumerate(self.rows):
            coded = slice(row.first_coded, row.coded)
            keys, values, decoded_keys, decoded_values = (
                x[:, :, coded] for x in self._row(index)
            )
            bias = np.zeros_like(keys) + self._rotated_bias(coded.start, coded.stop)
            keys, decoded_keys = ((x - bias) / balance for x in (keys, decoded_keys))
            turned = np.linalg.norm(bias / balance, axis=-1) * np.arange(coded.start, coded.stop)
            shares += [
                self._share(*self.case.keys, keys, decoded_keys, turned),
                self._share(*self.case.values, values, decoded_values, np.zeros_like(turned)),
            ]
        return max(shares)

    def _share(
        self, codec: str, bits: int, x: np.ndarray, decoded: np.ndarray, turned: np.ndarray
    ) -> float:
        count = x.shape[2]
        if codec != "lloyd-max" or count == 0:
            return 0.0
        some = np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)
        rotation = reference.rotation(x.shape[-1])
        x, decoded = (y[:, :, some] @ rotation for y in (x, decoded))
        length = np.linalg.norm(x, axis=-1)
        inexact = ROUNDOFF["float32"] * (64 + turned[:, :, some] / length)
        if mx.default_device().type == mx.gpu and self.kernel not in FUSED:
            inexact = inexact + 4 * TF32_ROUNDOFF
        most = 1.2 * stored.least_loss(x, bits, inexact)
        most = most + (1 + reference.ALONG) ** 0.5 * inexact * length
        return (stored.loss(x, decoded) / most).max()

    def _row(self, index: int) -> Tuple[np.ndarray, ...]:
        """Keys and values of a sequence in fp64, and as decoded: zeros where they are exact."""
        row = self.rows[index]
        keys, values = _fp64(self.keys[index]), _fp64(self.values[index])
        decoded_keys, decoded_values = np.zeros_like(keys), np.zeros_like(values)
        if row.key_codes:
            coded = slice(row.first_coded, row.coded)
            decoded_keys[:, :, coded] = self._decode_keys(row.key_codes, coded)
            decoded_values[:, :, coded] = self._decode_values(row.value_codes)
        return keys, values, decoded_keys, decoded_values

    def _remembered(self, length: int):
        if not self.case.ring:
            return True
        newest = length - (self.case.ring - VISIBILITY.sinks)
        return (np.arange(length) < VISIBILITY.sinks) | (np.arange(length) >= newest)

    def _tolerance(self, out: float, score: float, value: float) -> float:
        tf32 = self.kernel not in FUSED and mx.default_device().type == mx.gpu
        u = TF32_ROUNDOFF if tf32 else ROUNDOFF["float32"]
        inner = u * value * (64 + score * (self.case.dim**0.5 + 18))
        if self.kernel == "cuda" and self.case.keys[0] == self.case.values[0] == "lloyd-max":
            inner += CUDA_ROUNDOFF * value * (2 + score)
        return ROUNDOFF[self.case.dtype] * out + inner

    def _decode_keys(self, codes: Codes, positions: slice) -> np.ndarray:
        arrays = [np.array(x).swapaxes(-1, -2) for x in codes]
        x = stored.levels(arrays, *self.case.keys) @ reference.rotation(self.case.dim).T
        if self.balance is not None:
            x = x * self.balance
        return x + self._rotated_bias(positions.start, positions.stop)

    def _decode_values(self, codes: Codes) -> np.ndarray:
        arrays, (codec, bits) = [np.array(x) for x in codes], self.case.values
        affine = codec == "affine"
        x = stored.grouped(arrays, bits) if affine else stored.levels(arrays, codec, bits)
        x = x[..., : self.case.value_dim]
        return x @ reference.rotation(self.case.value_dim).T


def _fp64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("--kernel", help="only this one (default: all that this device can run)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")


def run(args: argparse.Namespace) -> int:
    """Check and print.

    Returns:
        0 if all is right, 1 if anything is not.
    """
    kernels = [resolve_kernel(args.kernel)] if args.kernel else available_kernels()
    if not fused_kernels():
        sys.stdout.write(
            f"no fused kernel runs on {mx.default_device()}; checking {' and '.join(kernels)}\n"
        )
    if "compiled" in kernels and compiling.problem():
        sys.stdout.write(f"compiled: {compiling.problem()}\n")
    failed, total = 0, 0
    for kernel in kernels:
        for tested in QUICK if args.quick else table():
            result = check(tested, kernel)
            total, failed = total + 1, failed + (not result.ok)
            sys.stdout.write(_line(kernel, tested, result) + "\n")
    sys.stdout.write(f"{total - failed} of {total} OK\n")
    return 1 if failed else 0


def _line(kernel: str, tested: Case, result: Result) -> str:
    verdict = "OK" if result.ok else f"FAIL {result.note}".rstrip()
    return f"{kernel:8} {tested!s:60} error {result.error:.1e} of {result.tolerance:.1e}  {verdict}"

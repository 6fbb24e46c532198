"""A layer of a case of ``mlx_turboquant selftest``, and what its attention should give.

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

On a GPU more than 8 queries, and those of the eager and the compiled kernel, are for MLX's own
attention over keys and values that are dequantized to the model's dtype. There U is 2^-11 at
least, since MLX multiplies fp32 matrices in TF32, and that adds

    2 U V (1 + S)

- 2 U V: values are rounded, and so are weights.
- U S: a score is rounded.
- U S: so are the channels of keys, and of queries once they are scaled: sqrt(D) errors of U
  times those of keys and queries come to U S / sqrt(3) for each of both, or 0.8 U S together
  (S as below).

Without a fused kernel vectors are rotated back by a matrix in TF32, as if all were rounded
once more: 2^-11 V (1 + S). Prompts have a smaller key bias, and so a smaller S: in half
precision a bias like those of models would hide all else.

The CUDA kernel for Lloyd-Max codes multiplies whole numbers: channels of rotated queries,
and the weights of codes, are off by up to w = 2^-16 of the largest of the vector or of 64
tokens. That adds

    w V (2 + S)

- S w: sqrt(D) errors of up to w max|q|, times those of a key's channels, add up to
  w max|q| |k|; and max|q| is about 4 |q| / sqrt(D), as S is about 4 |q| |k| / sqrt(D).
- 2 w V: 64 errors of up to w times the largest weight, times values of about V / 4.

Codes are not compared: by rounding one can fall to the other side of a threshold, and a
size, with all codes of its vector, to the other side of a tie. That costs little, so
what a vector x loses, by the measure that the codec minimizes, may be

    1.2 (what it loses in the codes of reference.py)
    + sqrt(1 + ALONG) (u (64 |x| + t |b|) + 4 U |x|)

- 64 u |x|: the rotation, and sizes that are powers of two.
- u t |b|: angles up to t are rounded, and turn the bias b that is taken away from keys.
- 4 U |x|: only where MLX rotates vectors by a matrix in TF32, U = 2^-11: on a GPU for all
  kernels but the fused ones, which rotate by themselves.

Codes of segments are judged one by one, since an error that is fed back changes all codes after
it: each must be the nearest to what the vector and the codes before it come to, see
:func:`stored.share_of_segment`; and sizes must be such that the nearest levels lose no more than
above.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention

from .. import reference
from ..attention.dispatch import attend
from ..backends import backend, support
from ..backends.fused import MAX_QUERIES
from ..cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import CodecSpec, Codes, KVCodec
from ..codecs.segmented import FIRST_BITS, USUAL_BITS
from . import stored
from .cases import Case

VISIBILITY = Visibility(window=64, sinks=4)
KV_HEADS = 2
# Queries this large make some weights large and many small, as those of models are.
QUERY_SIZE = 3.0
BIAS_SIZE = 20.0
# Some take no weight and some nearly all of it.
LEARNED_SIZE = 10.0
# Of prompts, see above.
PROMPT_BIAS_SIZE = 2.0

ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TF32_ROUNDOFF = 2.0**-11
CUDA_ROUNDOFF = 2.0**-16

# Tokens of a sequence whose codes are judged.
SAMPLE = 128


class CheckedLayer:
    """The caches, queries and new tokens of a case, and what attention should make of them."""

    def __init__(self, tested: Case, kernel: str):
        self.case, self.kernel = tested, kernel
        self.fused = backend(kernel).max_queries > 0
        self.is_prompt = tested.count > MAX_QUERIES
        self.visibility = VISIBILITY._replace(invariant=tested.invariant)
        self.random = np.random.default_rng(zlib.crc32(str(tested).encode()))
        dim, rope = tested.dim, tested.rope
        rotary = dim // 2 if rope == "partial" else dim
        self.rope = {"traditional": rope == "traditional", "dims": rotary}
        self.bias = self.balance = self.layout = self.query_squares = None
        codec_parts: tuple[Any, ...] = ()
        if tested.extras:
            size = PROMPT_BIAS_SIZE if self.is_prompt else BIAS_SIZE
            self.bias = size * self._normal(KV_HEADS, dim)
            self.balance = np.exp(0.3 * self._normal(KV_HEADS, 1, dim))
            rope_module = nn.RoPE(rotary, traditional=rope == "traditional")
            if tested.segmented:
                order = self.random.permuted([np.arange(dim)] * KV_HEADS, axis=1)
                first_bits = self.random.permutation(FIRST_BITS)[:KV_HEADS, None]
                self.layout = np.concatenate([order, first_bits], axis=1).astype(np.int32)
                self.query_squares = np.exp(self._normal(KV_HEADS, dim))
            of_segments = self.layout, self.query_squares
            codec_parts = (
                mx.array(self.balance),
                KeyBias(mx.array(self.bias), rope_module),
                *(None if x is None else mx.array(x) for x in of_segments),
            )
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
        self.learned_sinks = None
        if tested.learned:
            self.learned_sinks = self._array(LEARNED_SIZE * self._normal(heads))

    def _normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32)

    def _array(self, x: np.ndarray) -> mx.array:
        return mx.array(x.astype(np.float32)).astype(getattr(mx, self.case.dtype))

    def _keys(self, length: int) -> mx.array:
        keys = self._normal(1, KV_HEADS, length, self.case.dim)
        return self._array(keys + self._rotated_bias(range(length)))

    def _rotated_bias(self, positions: Sequence[int] | np.ndarray):
        if self.bias is None:
            return 0.0
        bias = np.repeat(self.bias[:, None], len(positions), axis=1)
        return reference.rope(bias, positions, **self.rope)

    def _cache(self) -> CompressedKVCache:
        parts = self.codec, self.visibility, self.kernel
        if self.case.ring:
            return RotatingCompressedKVCache(self.case.ring, VISIBILITY.sinks, *parts)
        return CompressedKVCache(*parts)

    def attend(self) -> mx.array:
        """What mlx-lm's patched attention gives, (B, H_q, N, D_v)."""
        caches = [self._cache() for _ in self.keys]
        last = self.case.count + self.case.steps
        for cache, keys, values in zip(caches, self.keys, self.values):
            # In two steps: the codes of the second do not begin at position 0.
            end = keys.shape[2] - last
            for part in (slice(0, end // 2), slice(end // 2, end)):
                if part.stop > part.start:
                    cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        cache = caches[0] if len(caches) == 1 else CompressedKVCache.merge(caches)
        for step in range(self.case.steps):
            self._step(cache, self.queries[:, :, :1], last - step)
        out = self._step(cache, self.queries, self.case.count)
        self.rows = [cache] if len(caches) == 1 else cache.rows
        # A ring forgets what its first queries have read.
        self.sources = [self.view] if self.case.ring else self.rows
        return out

    def _step(self, cache: CompressedKVCache, queries: mx.array, before_end: int) -> mx.array:
        """What ``queries`` make of the tokens that begin so many before the end."""
        count = queries.shape[2]
        new = (
            mx.concatenate([x[:, :, x.shape[2] - before_end :][:, :, :count] for x in rows])
            for rows in (self.keys, self.values)
        )
        mask = cache.make_mask(count, return_array=False, window_size=None)
        cache.attending = True
        keys, values = cache.update_and_fetch(*new)
        self.view = cache.view
        out = attend(
            scaled_dot_product_attention,
            queries,
            keys,
            values,
            cache,
            self.scale,
            mask,
            self.learned_sinks,
        )
        mx.eval(out)
        cache.attending = False
        return out

    def expected(self) -> tuple[np.ndarray, float]:
        """The same in fp64, and how far off it may be."""
        outs, score, value = [], 0.0, 0.0
        for index, length in enumerate(self.case.lengths):
            queries = _fp64(self.queries[index : index + 1])
            keys, values, decoded_keys, decoded_values = self._fp64_rows[index]
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
                    learned_sinks=None if self.learned_sinks is None else _fp64(self.learned_sinks),
                    invariant=self.case.invariant,
                )
            )
            scores = queries @ np.repeat(keys, self.case.groups, axis=1).swapaxes(-1, -2)
            score = max(score, self.scale * np.abs(scores).max())
            value = max(value, np.abs(values).max())
        out = np.concatenate(outs)
        return out, self._tolerance(np.abs(out).max(), score, value)

    def holds_what_was_given(self) -> bool:
        """Whether the full-precision tokens of all caches are the sinks and the newest."""
        for index, row in enumerate(self.rows):
            slots = min(VISIBILITY.sinks, row.offset), row.full_start
            full = row.full_tokens
            for held, given in (full.keys, self.keys[index]), (full.values, self.values[index]):
                expected = mx.concatenate(
                    [given[:, :, : slots[0]], given[:, :, slots[1] :]], axis=2
                )
                if not mx.array_equal(held, expected):
                    return False
        return True

    def excess(self) -> float:
        """What vectors lose in Lloyd-Max codes, as a share of what they may: the most."""
        shares = [0.0]
        balance = 1.0 if self.balance is None else self.balance
        for index, row in enumerate(self.sources):
            count = row.quantized - row.first_quantized
            if count == 0:
                continue
            some = np.linspace(row.first_quantized, row.quantized - 1, min(count, SAMPLE)).astype(
                int
            )
            keys, values, decoded_keys, decoded_values = (
                x[:, :, some] for x in self._fp64_rows[index]
            )
            bias = np.zeros_like(keys) + self._rotated_bias(some)
            keys, decoded_keys = ((x - bias) / balance for x in (keys, decoded_keys))
            turned = np.linalg.norm(bias / balance, axis=-1) * some
            shares += [
                self._share(*self.case.keys, keys, decoded_keys, turned)
                if not self.case.segmented
                else self._share_of_segments(keys, row, some, turned),
                self._share(*self.case.values, values, decoded_values, np.zeros_like(turned)),
            ]
        return max(shares)

    def _share_of_segments(
        self, x: np.ndarray, row: CompressedKVCache, some: np.ndarray, turned: np.ndarray
    ) -> float:
        order, first_bits = self._cut
        arrays = [
            np.array(y)[..., some - row.first_quantized].swapaxes(-1, -2) for y in row.key_codes
        ]
        halves = np.split(np.take_along_axis(x, order[None, :, None], axis=-1), 2, axis=-1)
        parts = zip(halves, stored.segments(arrays, first_bits), (first_bits, 8 - first_bits))
        rotation = reference.rotation(self.case.dim // 2)
        return max(
            stored.share_of_segment(
                half[:, h] @ rotation,
                codes[:, h],
                sizes[:, h],
                bits[h],
                self._inexact(half[:, h], turned[:, h]),
                self._fed_back(h, segment),
            )
            for segment, (half, (codes, sizes), bits) in enumerate(parts)
            for h in range(KV_HEADS)
        )

    def _fed_back(self, h: int, segment: int) -> np.ndarray:
        """What errors of codes are multiplied by, see :func:`reference.feedback`."""
        if self.query_squares is None or self.balance is None:
            return np.zeros((self.case.dim // 2,) * 2)
        weights = self.query_squares[h] * self.balance[h, 0] ** 2
        return reference.feedback(np.split(weights[self._cut[0][h]], 2)[segment])

    @property
    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of the channels, (H, D), and the bits of the first segment, (H,)."""
        if self.layout is None:
            return np.array([range(self.case.dim)] * KV_HEADS), np.array([USUAL_BITS] * KV_HEADS)
        return self.layout[:, :-1], self.layout[:, -1]

    def _share(
        self, codec: str, bits: int, x: np.ndarray, decoded: np.ndarray, turned: np.ndarray
    ) -> float:
        if codec == "affine":
            return 0.0
        rotation = reference.rotation(x.shape[-1])
        return stored.share(x @ rotation, decoded @ rotation, bits, self._inexact(x, turned))

    def _inexact(self, x: np.ndarray, turned: np.ndarray) -> np.ndarray:
        """By what part of their length vectors (..., T, D) may be off."""
        inexact = ROUNDOFF["float32"] * (64 + turned / np.linalg.norm(x, axis=-1))
        if mx.default_device().type == mx.gpu and not self.fused:
            inexact = inexact + 4 * TF32_ROUNDOFF
        return inexact

    @functools.cached_property
    def _fp64_rows(self) -> list[tuple[np.ndarray, ...]]:
        return [self._row(index) for index in range(len(self.rows))]

    def _row(self, index: int) -> tuple[np.ndarray, ...]:
        """Keys and values of a sequence in fp64, and as decoded: zeros where there are no codes."""
        row = self.sources[index]
        keys, values = _fp64(self.keys[index]), _fp64(self.values[index])
        decoded_keys, decoded_values = np.zeros_like(keys), np.zeros_like(values)
        if row.key_codes:
            quantized = range(row.first_quantized, row.quantized)
            decoded_keys[:, :, quantized] = self._decode_keys(row.key_codes, quantized)
            decoded_values[:, :, quantized] = self._decode_values(row.value_codes)
        return keys, values, decoded_keys, decoded_values

    def _remembered(self, length: int):
        """What queries see of a ring, as a bool mask (N, T): what a RotatingKVCache holds."""
        if not self.case.ring:
            return True
        start, tokens = length - self.case.count, np.arange(length)
        before = min(self.case.ring - 1, start)
        forgotten = (tokens >= VISIBILITY.sinks) & (tokens < VISIBILITY.sinks + start - before)
        columns = np.where(tokens < VISIBILITY.sinks, tokens, tokens - (start - before))
        newest = before + np.arange(self.case.count)[:, None]
        return ~forgotten & (columns > newest - self.case.ring)

    def _tolerance(self, out: float, score: float, value: float) -> float:
        on_gpu = mx.default_device().type == mx.gpu
        roundoff = ROUNDOFF[self.case.dtype]
        inner = ROUNDOFF["float32"] * value * (64 + score * (self.case.dim**0.5 + 18))
        if self.is_prompt if self.fused else support.on_gpu():
            inner += 2 * max(roundoff, TF32_ROUNDOFF * on_gpu) * value * (1 + score)
            inner += TF32_ROUNDOFF * (on_gpu and not self.fused) * value * (1 + score)
        elif self.kernel == "cuda" and "affine" not in (self.case.keys[0], self.case.values[0]):
            inner += CUDA_ROUNDOFF * value * (2 + score)
        return roundoff * out + inner

    def _decode_keys(self, codes: Codes, positions: range) -> np.ndarray:
        arrays = [np.array(x).swapaxes(-1, -2) for x in codes]
        if self.case.segmented:
            known = self._rotated_bias(positions), 1.0 if self.balance is None else self.balance
            segments = stored.segments(arrays, self._cut[1])
            return reference.decode_segments(segments, *self._cut, *known)
        x = stored.levels(arrays, *self.case.keys) @ reference.rotation(self.case.dim).T
        if self.balance is not None:
            x = x * self.balance
        return x + self._rotated_bias(positions)

    def _decode_values(self, codes: Codes) -> np.ndarray:
        arrays, (codec, bits) = [np.array(x) for x in codes], self.case.values
        affine = codec == "affine"
        x = stored.grouped(arrays, bits) if affine else stored.levels(arrays, codec, bits)
        x = x[..., : self.case.value_dim]
        return x @ reference.rotation(self.case.value_dim).T


def _fp64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)

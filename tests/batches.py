"""Batches beside their rows alone, for tests."""

import copy

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from mlx_turboquant_plugin.attention.dispatch import attend
from mlx_turboquant_plugin.cache import CompressedKVCache, RotatingCompressedKVCache, Visibility
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS, KV_HEADS, DIM = 4, 2, 32
# Rows equal single runs, however either is cut.
VISIBILITY = Visibility(window=64, sinks=4, invariant=True)
CODEC = KVCodec(CodecSpec(DIM, DIM))
SCALE = DIM**-0.5


class Sequence:
    """Random keys, values and queries of one sequence, at every position."""

    def __init__(self, seed, length=700):
        rng = np.random.default_rng(seed)
        self.keys, self.values = rng.standard_normal((2, KV_HEADS, length, DIM), np.float32)
        self.queries = rng.standard_normal((HEADS, length, DIM), np.float32)


def single(ring=None):
    if ring is None:
        return CompressedKVCache(CODEC, VISIBILITY, "compiled")
    return RotatingCompressedKVCache(ring, 4, CODEC, VISIBILITY, "compiled")


def forward(cache, queries, keys, values):
    """One layer's attention over numpy arrays (B, H, N, D), as a patched model runs it."""
    queries, keys, values = map(mx.array, (queries, keys, values))
    mask = create_attention_mask(queries[:, 0], cache)
    cache.attending = True
    keys, values = cache.update_and_fetch(keys, values)
    out = attend(scaled_dot_product_attention, queries, keys, values, cache, SCALE, mask)
    cache.attending, cache.view = False, None
    mx.eval(out, cache.state)
    return np.array(out)


class Schedule:
    """A batched cache and, beside it, each of its sequences alone.

    Every method does to both what mlx-lm does to a batch, and compares what attention gives.
    """

    def __init__(self, count, seeds, ring=None):
        self.ring, self.seeds = ring, seeds
        self.sequences = [Sequence(next(seeds)) for _ in range(count)]
        self.alone = [single(ring) for _ in range(count)]
        self.batch = single(ring).merge([single(ring) for _ in range(count)])

    def prompt(self, lengths, chunk):
        """Tokens of different number for each row, padded on the right."""
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        if any(padding):
            self.batch.prepare(lengths=lengths, right_padding=padding)
        before = [cache.offset for cache in self.alone]
        for first in range(0, longest, chunk):
            count = min(chunk, longest - first)
            parts = [slice(o + first, o + first + count) for o in before]
            out = forward(self.batch, *self.tokens(parts))
            for row, (part, length, start) in enumerate(zip(parts, lengths, before)):
                valid = min(part.stop, start + length) - part.start
                if valid > 0:
                    self.check_row(row, out[row, :, :valid], slice(part.start, part.start + valid))
        if any(padding):
            self.batch.finalize()

    def decode(self, steps):
        for _ in range(steps):
            parts = [slice(cache.offset, cache.offset + 1) for cache in self.alone]
            out = forward(self.batch, *self.tokens(parts))
            for row, part in enumerate(parts):
                self.check_row(row, out[row], part)

    def tokens(self, parts):
        return [
            np.stack([getattr(s, name)[:, part] for s, part in zip(self.sequences, parts)])
            for name in ("queries", "keys", "values")
        ]

    def check_row(self, row, out, part):
        s = self.sequences[row]
        expected = forward(
            self.alone[row],
            s.queries[None, :, part],
            s.keys[None, :, part],
            s.values[None, :, part],
        )
        np.testing.assert_allclose(out, expected[0], atol=2e-5)

    def filter(self, keep):
        self.batch.filter(keep)
        self.sequences = [self.sequences[i] for i in keep]
        self.alone = [self.alone[i] for i in keep]

    def extend(self, other):
        self.batch.extend(other.batch)
        self.sequences += other.sequences
        self.alone += other.alone

    def split(self, keep):
        """As PromptProcessingBatch does: a copy, and each half filtered."""
        other = copy.copy(self)
        other.batch = copy.deepcopy(self.batch)
        other.filter(keep)
        self.filter([i for i in range(len(self.alone)) if i not in keep])
        return other

    def remake(self):
        """Take all rows out and merge them again."""
        rows = [self.batch.extract(i) for i in range(len(self.alone))]
        for row, alone in zip(rows, self.alone):
            assert row.offset == alone.offset
            np.testing.assert_array_equal(row.keys_and_values()[0], alone.keys_and_values()[0])
        self.batch = rows[0].merge(rows)

    def trim(self, n):
        assert self.batch.trim(n) == n
        for cache in self.alone:
            cache.trim(n)

    def check(self):
        offsets = [cache.offset for cache in self.alone]
        assert self.batch.offset.tolist() == offsets
        assert (self.batch.left_padding + self.batch.offset).tolist() == [self.batch.size()] * len(
            offsets
        )

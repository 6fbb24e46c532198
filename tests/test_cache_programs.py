"""Random programs of cache operations: the same on mlx-lm's caches and on ours without loss."""

import copy
import pickle
import random
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, save_prompt_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.attention.dispatch import attend
from mlx_turboquant_plugin.cache import (
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
    compressed,
)
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec

HEADS, KV_HEADS, DIM = 4, 2, 32
CODEC = KVCodec(CodecSpec(DIM, DIM, "exact", value_codec="exact"))


class Program:
    """Operations drawn by ``seed``, each on both caches; after each, both hold the same.

    Attributes:
        done: the operations so far, in words: a program that fails is shrunk from these.
    """

    def __init__(self, seed, folder):
        self.draw, self.folder, self.done = random.Random(seed), folder, []
        self.rng = np.random.default_rng(seed)
        window, sinks = self.draw.choice([0, 32, 64]), self.draw.choice([0, 4, 40])
        visibility = Visibility(window, sinks, self.draw.random() < 0.5)
        self.ring = self.draw.choice([None, None, 100, 300])
        if self.ring is None:
            self.fresh, self.theirs = partial(CompressedKVCache, CODEC, visibility), KVCache()
        else:
            self.fresh = partial(RotatingCompressedKVCache, self.ring, sinks, CODEC, visibility)
            self.theirs = RotatingKVCache(self.ring, sinks)
        self.ours = self.fresh()
        self.done.append(f"{type(self.ours).__name__} {self.ring} {visibility}")

    def run(self, length):
        self.append()
        for _ in range(length):
            kinds = [self.append, self.append, self.trim, self.rewind, self.copy, self.pickle]
            kinds += [self.save, self.batch, self.unfit, self.interrupt]
            self.draw.choice(kinds)()
            self.check()
            if self.ours.empty():
                self.append()
        self.append()

    def tokens(self, count, rows=1):
        """Queries, keys and values of ``count`` tokens."""
        heads = HEADS, KV_HEADS, KV_HEADS
        return [
            mx.array(self.rng.standard_normal((rows, h, count, DIM), np.float32)) for h in heads
        ]

    def count(self):
        return self.draw.choice([1, 1, 2, 16, 17, 33, self.draw.randint(1, 300)])

    def append(self, rows=1, count=None):
        count = count or self.count()
        self.done.append(f"append {count}")
        self.forward(self.tokens(count, rows))

    def forward(self, tokens):
        outs = []
        for cache, function in ((self.theirs, scaled_dot_product_attention), (self.ours, attend)):
            queries, keys, values = tokens
            mask = create_attention_mask(queries[:, 0], cache)
            first = () if cache is self.theirs else (scaled_dot_product_attention,)
            if first:
                cache.attending = True
            keys, values = cache.update_and_fetch(keys, values)
            out = function(*first, queries, keys, values, cache=cache, scale=0.2, mask=mask)
            if first:
                cache.attending = False
            outs.append(np.array(out))
        np.testing.assert_allclose(outs[1], outs[0], atol=2e-4)

    def trim(self):
        if self.theirs.is_trimmable():
            count = self.draw.choice([1, 5, 16, 17, 100, self.theirs.offset])
            self.done.append(f"trim {count}")
            assert self.ours.trim(count) == self.theirs.trim(count)

    def rewind(self):
        if self.theirs.is_trimmable():
            count = self.draw.randint(0, self.theirs.offset)
            self.done.append(f"offset -= {count}")
            self.ours.offset -= count
            self.theirs.trim(count)

    def copy(self):
        self.done.append("deepcopy")
        left = self.ours
        self.ours, self.theirs = copy.deepcopy((self.ours, self.theirs))
        left.update_and_fetch(*self.tokens(self.count())[1:])

    def pickle(self):
        self.done.append("pickle")
        self.ours, self.theirs = pickle.loads(pickle.dumps((self.ours, self.theirs)))

    def save(self):
        self.done.append("save and load")
        path = str(self.folder / "caches.safetensors")
        save_prompt_cache(path, [self.ours, self.theirs])
        self.ours, self.theirs = mlx_lm_cache.load_prompt_cache(path)

    def batch(self):
        """Join a batch, with an uncompressed cache or a compressed one, grow and leave it."""
        # Of rings, mlx-lm's batch forgets what they keep, and extract() does not give it back.
        if self.ring is not None and self.theirs.keep:
            return
        other, row, steps = self.count(), self.draw.randint(0, 1), self.draw.randint(0, 3)
        plain, extends = self.draw.random() < 0.5, self.draw.random() < 0.5
        kind = "plain" if plain else "compressed"
        self.done.append(f"{'extend' if extends else 'merge'} with {kind} {other}, row {row}")
        ours, theirs = self.fresh(), type(self.theirs)(*([self.ring] if self.ring else []))
        ours = copy.copy(theirs) if plain else ours
        alone = self.tokens(other)[1:]
        pairs = []
        for cache, new in ((self.ours, ours), (self.theirs, theirs)):
            new.update_and_fetch(*alone)
            rows = [new, new]
            rows[row] = cache
            if extends:
                batch = rows[0].merge(rows[:1])
                batch.extend(rows[1].merge(rows[1:]))
            else:
                batch = rows[0].merge(rows)
            pairs.append(batch)
        self.ours, self.theirs = pairs
        # After a ring turns, mlx-lm's mask for a chunk hides a short row's first tokens.
        count = None if self.ring is None else 1
        for _ in range(steps):
            self.append(2, count)
        if self.draw.random() < 0.3:
            left, self.ours = self.ours, copy.copy(self.ours)
            left.update_and_fetch(*self.tokens(self.count(), 2)[1:])
        if self.draw.random() < 0.5:
            kept = [row] * self.draw.randint(1, 2)
            self.done.append(f"filter {kept}")
            self.ours.filter(kept), self.theirs.filter(kept)
            self.append(len(kept), count)
            row = 0
        elif plain:
            left = self.ours.extract(1 - row)
            assert type(left) is type(theirs) and left.offset == self.theirs.offset[1 - row]
        self.ours, self.theirs = self.ours.extract(row), self.theirs.extract(row)

    def unfit(self):
        self.done.append("what does not fit")
        _, keys, values = self.tokens(self.count())
        with pytest.raises(ValueError, match="do not fit"):
            self.ours.update_and_fetch(keys, values[..., 1:])

    def interrupt(self):
        self.done.append("interrupted")

        def encode(cache, end):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(compressed, "encode", encode)
            self.ours.update_and_fetch(*self.tokens(self.count())[1:])

    def check(self):
        assert self.ours.offset == self.theirs.offset
        assert self.ours.size() == self.theirs.size()
        if self.theirs.offset == 0:
            assert self.ours.empty()
            return
        for cache in (self.ours, self.ours.to_exact()):
            assert cache.offset == self.theirs.offset
            for a, b in zip(cache.keys_and_values(), self.seen()):
                if self.ring is not None:
                    a, b = (mx.sort(x, axis=2) for x in (a, b))
                np.testing.assert_allclose(a, b, atol=2e-4)

    def seen(self):
        """Keys and values that the newest token of mlx-lm's cache saw."""
        pair = self.theirs.keys_and_values()
        count, keep = pair[0].shape[2], self.ours.visibility.sinks
        if self.ring is None or count <= self.ring:
            return pair
        # After a chunk there are more for its first query.
        return [
            mx.concatenate([x[:, :, :keep], x[:, :, count - self.ring + keep :]], axis=2)
            for x in pair
        ]


def run(seeds, folder):
    mlx_turboquant_plugin.enable()
    for seed in seeds:
        program = Program(seed, folder)
        try:
            program.run(8)
        except Exception as error:
            raise AssertionError(f"program {seed}: {'; '.join(program.done)}") from error


@pytest.mark.parametrize("part", range(4))
def test_programs(part, tmp_path):
    run(range(25 * part, 25 * (part + 1)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_programs(part, tmp_path):
    run(range(100 * (part + 1), 100 * (part + 2)), tmp_path)

"""The batched cache is the same as its rows by themselves, whatever joins and leaves."""

import copy
import pickle

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin.attention import dispatch
from mlx_turboquant_plugin.attention.dispatch import attend
from mlx_turboquant_plugin.cache import (
    BatchCompressedKVCache,
    CompressedKVCache,
    RotatingCompressedKVCache,
    Visibility,
)
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


def test_prompts_of_every_length_decode_as_alone():
    schedule = Schedule(8, iter(range(8)))
    schedule.prompt([1, 3, 4, 63, 70, 100, 131, 300], chunk=128)
    schedule.decode(70)
    schedule.check()


@pytest.mark.parametrize("ring", [None, 40, 150])
@pytest.mark.parametrize("seed", range(10))
def test_random_schedules(seed, ring):
    rng = np.random.default_rng(seed)
    seeds = iter(range(1000 * seed, 1000 * seed + 1000))

    def fresh():
        count = int(rng.integers(1, 4))
        schedule = Schedule(count, seeds, ring)
        schedule.prompt(rng.integers(1, 160, count).tolist(), int(rng.integers(2, 100)))
        return schedule

    schedule = fresh()
    for _ in range(8):
        action = rng.choice(["decode", "prompt", "join", "leave", "split", "remake", "trim"])
        count = len(schedule.alone)
        if action == "decode":
            schedule.decode(int(rng.integers(1, 12)))
        elif action == "prompt":
            schedule.prompt(rng.integers(1, 60, count).tolist(), int(rng.integers(1, 50)))
        elif action == "join":
            schedule.extend(fresh())
        elif action == "leave" and count > 1:
            schedule.filter(sorted(rng.choice(count, count - 1, replace=False).tolist()))
        elif action == "split" and count > 1:
            other = schedule.split([0])
            other.decode(3)
            schedule.extend(other)
        elif action == "remake":
            schedule.remake()
        elif action == "trim" and schedule.batch.is_trimmable():
            schedule.trim(int(rng.integers(0, min(c.offset for c in schedule.alone))))
        schedule.check()
    schedule.decode(40)


def test_left_padded_prompts_as_batchkvcache_takes_them():
    lengths = [190, 17, 130]
    longest = max(lengths)
    sequences = [Sequence(i) for i in range(3)]
    batch = BatchCompressedKVCache([longest - n for n in lengths])
    for row in batch.rows:
        row.bind(CODEC, "", "compiled", True, None)
    padded = []
    for name in ("queries", "keys", "values"):
        rows = [getattr(s, name)[:, :n] for s, n in zip(sequences, lengths)]
        padded.append(
            np.stack([np.pad(r, [(0, 0), (longest - r.shape[1], 0), (0, 0)]) for r in rows])
        )
    outs = [forward(batch, *(x[:, :, a : a + 90] for x in padded)) for a in (0, 90, 180)]
    out = np.concatenate(outs, axis=2)
    for row, (s, n) in enumerate(zip(sequences, lengths)):
        alone = CompressedKVCache(CODEC, kernel="compiled")
        expected = forward(
            alone, *(getattr(s, x)[None, :, :n] for x in ("queries", "keys", "values"))
        )
        np.testing.assert_allclose(out[row, :, longest - n :], expected[0], atol=2e-5)
        assert not out[row, :, : longest - n].any()
    assert batch.offset.tolist() == lengths


def test_counts_and_masks_are_those_of_batchkvcache():
    """Models with uncompressed layers share one mask, so both must lay tokens out alike."""
    lengths, more = [5, 80, 33], [20, 1, 7]
    ours = single().merge([single() for _ in lengths])
    stock = BatchKVCache([0, 0, 0])

    def step(count):
        x = mx.random.normal((len(ours.left_padding), KV_HEADS, count, DIM))
        for cache in (ours, stock):
            cache.update_and_fetch(x, x)
        same()

    def same():
        assert ours.offset.tolist() == stock.offset.tolist()
        assert ours.left_padding.tolist() == stock.left_padding.tolist()
        assert ours.size() == stock.size()
        assert mx.array_equal(ours.make_mask(3), stock.make_mask(3))

    for chunk in (lengths, more):
        padding = [max(chunk) - n for n in chunk]
        for cache in (ours, stock):
            cache.prepare(lengths=chunk, right_padding=padding)
        step(max(chunk))
        for cache in (ours, stock):
            cache.finalize()
        same()
    step(1)
    for cache in (ours, stock):
        cache.filter([0, 2])
    same()
    for cache, other in ((ours, single().merge([single()])), (stock, BatchKVCache([0]))):
        cache.extend(other)
    same()
    for cache in (ours, stock):
        assert cache.trim(4) == 4
    same()


def test_fetched_keys_are_those_of_batchkvcache_while_nothing_is_coded():
    ours, stock = BatchCompressedKVCache([3, 0]), BatchKVCache([3, 0])
    for count in (10, 1, 1):
        x = mx.random.normal((2, KV_HEADS, count, DIM))
        got, expected = ours.update_and_fetch(x, x)[0], stock.update_and_fetch(x, x)[0]
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got[0, :, 3:], expected[0, :, 3:])
        np.testing.assert_array_equal(got[1], expected[1])


def test_mlx_lms_own_caches_can_join():
    s = Sequence(0)
    stock = KVCache()
    stock.update_and_fetch(mx.array(s.keys[None, :, :150]), mx.array(s.values[None, :, :150]))
    batch = single().merge([single(), stock, KVCache()])
    assert batch.offset.tolist() == [0, 150, 0]
    # They leave as exact as they came.
    ours, expected = batch.extract(1).keys_and_values(), stock.keys_and_values()
    np.testing.assert_array_equal(ours[0], expected[0])
    with pytest.raises(TypeError, match="QuantizedKVCache can't join"):
        single().merge([single(), QuantizedKVCache()])


def _twice(batch):
    batch.filter([0, 0, 1])
    return batch, [0, 0, 1], []


def _copied(batch):
    return copy.copy(batch), [0, 1], [batch]


def _joined_twice(batch):
    other = copy.deepcopy(batch)
    for _ in range(2):
        batch.extend(other)
    return batch, [0, 1, 0, 1, 0, 1], [other]


def _joined_itself(batch):
    batch.extend(batch)
    return batch, [0, 1, 0, 1], []


@pytest.mark.parametrize("counts", [(5, 1), (1, 1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [_twice, _copied, _joined_twice, _joined_itself])
def test_what_is_there_twice_grows_apart(make, packed, counts):
    """Beam search repeats rows, and BatchKVCache shares nothing with its copies."""
    schedule = Schedule(2, iter(range(2)))
    schedule.prompt([150, 70], chunk=64)
    if packed:
        tokens = mx.random.normal((2, KV_HEADS, 1, DIM))
        schedule.batch.update_and_fetch(tokens, tokens)
        for row, cache in enumerate(schedule.alone):
            cache.update_and_fetch(tokens[row : row + 1], tokens[row : row + 1])
    batch, rows, others = make(schedule.batch)
    alone = [copy.copy(schedule.alone[row]) for row in rows]
    left = [(other, other.keys_and_values()[0]) for other in others]
    for count in counts:
        keys = mx.random.normal((len(rows), KV_HEADS, count, DIM))
        batch.update_and_fetch(keys, keys)
        for row, cache in enumerate(alone):
            cache.update_and_fetch(keys[row : row + 1], keys[row : row + 1])
    for row, cache in zip(batch.rows, alone):
        np.testing.assert_array_equal(row.keys_and_values()[0], cache.keys_and_values()[0])
    for other, keys in left:
        np.testing.assert_array_equal(other.keys_and_values()[0], keys)


def test_rings_with_fewer_tokens_than_they_keep():
    rows = [single(40), single(40)]
    rows[0].update_and_fetch(*mx.random.normal((2, 1, KV_HEADS, 30, DIM)))
    batch = rows[0].merge(rows)
    batch.prepare(lengths=[9, 2], right_padding=[0, 7])
    x = mx.random.normal((2, KV_HEADS, 9, DIM))
    keys, _ = batch.update_and_fetch(x, x)
    assert keys.shape[2] == 39
    np.testing.assert_array_equal(keys[1, :, 30:32], x[1, :, :2])
    assert not keys[1, :, :30].any() and not keys[1, :, 32:].any()


def test_left_padding_comes_before_any_token():
    batch = single().merge([single(), single()])
    x = mx.zeros((2, KV_HEADS, 1, DIM))
    batch.update_and_fetch(x, x)
    with pytest.raises(ValueError, match="empty BatchCompressedKVCache"):
        batch.prepare(left_padding=[1, 0])


def test_every_byte_of_16_sequences_is_counted():
    """What the rows take is what they take alone, and packing adds little."""
    rows, tokens = [], 2048
    for _ in range(16):
        row = CompressedKVCache(KVCodec(CodecSpec(128, 128)))
        keys = mx.random.normal((1, 1, tokens, 128)).astype(mx.bfloat16)
        row.update_and_fetch(keys, keys)
        rows.append(row)
    alone = sum(row.nbytes for row in rows)
    batch = rows[0].merge(rows)
    assert batch.nbytes == alone
    token = mx.random.normal((16, 1, 1, 128)).astype(mx.bfloat16)
    batch.update_and_fetch(token, token)
    mx.eval(batch.state)
    assert batch.nbytes <= 1.03 * alone


def long_batch(count):
    """A batch of rows of 4096 tokens that nobody else holds."""
    rows = []
    for _ in range(count):
        rows.append(single())
        x = mx.random.normal((1, 1, 4096, DIM))
        rows[-1].update_and_fetch(x, x)
    return rows[0].merge(rows)


def test_an_extracted_row_does_not_hold_the_memory_of_the_batch():
    mx.clear_cache()
    before = mx.get_active_memory()
    batch = long_batch(8)
    token = mx.zeros((8, 1, 1, DIM))
    batch.attending = True
    batch.update_and_fetch(token, token)
    mx.eval(batch.keys, batch.view.rows.key_codes, batch.view.rows.value_codes)
    batch.view = None
    del token
    row = batch.extract(0)
    mx.eval(row.state)
    del batch
    mx.clear_cache()
    assert mx.get_active_memory() - before < 3 * row.nbytes + 2**20


def test_state_round_trip():
    schedule = Schedule(3, iter(range(3)), None)
    schedule.prompt([100, 3, 150], chunk=64)
    schedule.decode(2)
    schedule.batch = BatchCompressedKVCache.from_state(schedule.batch.state)
    for row in schedule.batch.rows:
        row.bind(CODEC, "", "compiled", True, None)
    schedule.decode(5)
    schedule.check()


def _saved(batch, folder):
    path = str(folder / "batch.safetensors")
    save_prompt_cache(path, [batch])
    return load_prompt_cache(path)[0]


@pytest.mark.parametrize(
    "change, kept",
    [
        (lambda batch, folder: BatchCompressedKVCache.from_state(batch.state), [0, 1, 2]),
        (_saved, [0, 1, 2]),
        (lambda batch, folder: batch.filter([2, 0]) or batch, [2, 0]),
        (lambda batch, folder: pickle.loads(pickle.dumps(batch)), [0, 1, 2]),
    ],
)
def test_padding_that_is_to_come_is_not_forgotten(change, kept, tmp_path):
    mlx_turboquant_plugin.enable()
    batch = single().merge([single(), single(), single()])
    lengths = [9, 3, 6]
    batch.prepare(lengths=lengths, right_padding=[0, 6, 3])
    x = mx.random.normal((3, KV_HEADS, 9, DIM))
    batch.update_and_fetch(x[:, :, :4], x[:, :, :4])
    batch = change(batch, tmp_path)
    rest = x[mx.array(kept), :, 4:]
    batch.update_and_fetch(rest, rest)
    batch.finalize()
    assert batch.offset.tolist() == [lengths[row] for row in kept]
    for number, row in enumerate(kept):
        keys, _ = batch.extract(number).keys_and_values()
        np.testing.assert_array_equal(keys[0], x[row, :, : lengths[row]])


def test_the_bridge_serves_packed_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "attend_packed", None)
    schedule = Schedule(3, iter(range(3)))
    schedule.prompt([150, 40, 333], 64)
    for cache in (*schedule.alone, *schedule.batch.rows):
        cache.kernel = "bridge"
    schedule.decode(3)


def test_a_batch_holds_its_codes_once():
    mx.clear_cache()
    before = mx.get_active_memory()
    batch = long_batch(4)
    batch.attending = True
    for _ in range(70):
        token = mx.zeros((4, 1, 1, DIM))
        batch.update_and_fetch(token, token)
        batch.view = None
        mx.eval(batch.keys, batch._packed.key_codes, batch._packed.value_codes)
    mx.clear_cache()
    assert mx.get_active_memory() - before < 1.3 * batch.nbytes + 2**18

"""The batched cache is the same as its rows by themselves, whatever joins and leaves."""

import mlx.core as mx
import numpy as np
import pytest
from batches import CODEC, DIM, KV_HEADS, Schedule, Sequence, forward, single
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from mlx_turboquant_plugin.attention import dispatch
from mlx_turboquant_plugin.backends import backend
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache


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


def test_fetched_keys_are_those_of_batchkvcache_while_nothing_is_quantized():
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


def test_the_bridge_serves_batched_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "attend_batched", None)
    schedule = Schedule(3, iter(range(3)))
    schedule.prompt([150, 40, 333], 64)
    for cache in (*schedule.alone, *schedule.batch.rows):
        cache.backend = backend("bridge")
    schedule.decode(3)

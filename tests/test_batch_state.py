"""What batches hold and for how long: copies, saved ones, and their memory."""

import copy
import pickle

import mlx.core as mx
import numpy as np
import pytest
from batches import CODEC, DIM, KV_HEADS, Schedule, single
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec


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
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("make", [_twice, _copied, _joined_twice, _joined_itself])
def test_what_is_there_twice_grows_apart(make, batched, counts):
    """Beam search repeats rows, and BatchKVCache shares nothing with its copies."""
    schedule = Schedule(2, iter(range(2)))
    schedule.prompt([150, 70], chunk=64)
    if batched:
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


def test_every_byte_of_16_sequences_is_counted():
    """What the rows take is what they take alone, and batching them adds little."""
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


def test_a_batch_holds_its_codes_once():
    mx.clear_cache()
    before = mx.get_active_memory()
    batch = long_batch(4)
    batch.attending = True
    for _ in range(70):
        token = mx.zeros((4, 1, 1, DIM))
        batch.update_and_fetch(token, token)
        batch.view = None
        mx.eval(batch.keys, batch._batched.key_codes, batch._batched.value_codes)
    mx.clear_cache()
    assert mx.get_active_memory() - before < 1.3 * batch.nbytes + 2**18

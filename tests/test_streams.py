"""Work of one step, shared by several streams of the CPU."""

import os
import threading

import mlx.core as mx
import numpy as np
import pytest
from test_attention import LEARNED, SINKS, WINDOW, Case, close, step

from mlx_turboquant_plugin import streams
from mlx_turboquant_plugin.attention import pieces
from mlx_turboquant_plugin.backends import mlx_ops
from mlx_turboquant_plugin.cache import CompressedKVCache, Visibility
from mlx_turboquant_plugin.cache.rotating import RotatingCompressedKVCache
from mlx_turboquant_plugin.cache.visibility import BLOCK, ROLLBACK
from mlx_turboquant_plugin.codecs.kv_codec import ALL

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.cpu, reason="only the CPU's streams share"
)
STREAMS = [mx.new_thread_local_stream(mx.cpu) for _ in range(3)]


@pytest.fixture
def use(monkeypatch):
    """Lets any number of streams share, however little there is; returns the splits so far."""
    monkeypatch.setattr(pieces, "LEAST_SPLIT", 1)
    shared = []
    original = pieces._fold_pieces

    def fold(rotated, bias, quantized, split, *args):
        shared.append((mx.default_stream(mx.cpu), split))
        return original(rotated, bias, quantized, split, *args)

    monkeypatch.setattr(pieces, "_fold_pieces", fold)

    def use(count):
        monkeypatch.setattr(pieces, "helpers", lambda: tuple(STREAMS[: count - 1]))
        shared.clear()
        return shared

    return use


CASES = [
    {},
    {"batch": 3, "groups": 3},
    {"extras": True, "length": 1100},
    {"length": 2100, "dim": 80},
    {"length": 600, "key_codec": "affine", "value_codec": "affine"},
    {"length": 600, "key_codec": "exact", "value_codec": "exact"},
    {"length": 100},
]


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("learned", [None, LEARNED])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_several_streams_find_what_one_finds(count, case, learned, kernel, use):
    learned = learned if case.get("groups", 2) == 2 else None
    case = Case(**case)
    use(1)
    alone = case.run(kernel, learned_sinks=learned)
    shared = use(count)
    together = case.run(kernel, learned_sinks=learned)
    close(together, np.array(alone), 2e-6 if case.bias is None else 1e-3)
    covered = [position for _, split in shared for position in split]
    quantized = case.cache(kernel).quantized
    assert covered == list(range(quantized)) and len({str(s) for s, _ in shared}) == len(shared)
    if case.length > 500:
        assert len(shared) == count


@pytest.mark.parametrize("additive", [False, True])
def test_masks_are_cut_like_the_tokens(additive, use):
    case = Case(length=700)
    mask = mx.random.uniform(shape=(1, 700)) < 0.3
    mask = mx.where(mask, 0.0, -mx.inf) if additive else mask
    use(1)
    alone = case.run("compiled", mask=mask)
    assert len(use(3)) == 0
    close(case.run("compiled", mask=mask), np.array(alone), 2e-6)


def test_a_query_that_sees_nothing_stays_a_number(use):
    use(3)
    case = Case(length=700)
    assert mx.all(mx.isfinite(case.run("compiled", mask=mx.zeros((1, 700), mx.bool_)))).item()


def test_a_ring(use):
    case = Case(length=900)
    outs = []
    for count in (1, 3):
        shared = use(count)
        cache = RotatingCompressedKVCache(
            400, SINKS, case.codec, Visibility(WINDOW, SINKS), "compiled"
        )
        cache.update_and_fetch(case.keys[:, :, :-1], case.values[:, :, :-1])
        last = case.keys[:, :, -1:], case.values[:, :, -1:]
        outs.append(step(cache, case.queries, *last, case.scale, None))
    assert len(shared) == 3
    close(outs[1], np.array(outs[0]), 2e-6)


def test_batches(use):
    cases = Case(length=800), Case(length=350), Case(length=301)
    for case in cases:
        # Or they would not be batched.
        case.codec = cases[0].codec
    last = [[x[:, :, -1:] for x in (c.queries, c.keys, c.values)] for c in cases]
    queries, keys, values = (mx.concatenate(rows) for rows in zip(*last))
    outs = []
    for count in (1, 3):
        shared = use(count)
        batch = CompressedKVCache.merge([case.cache("compiled") for case in cases])
        mask = batch.make_mask(1)
        outs.append(step(batch, queries, keys, values, cases[0].scale, mask))
    assert len(shared) == 3
    close(outs[1], np.array(outs[0]), 2e-6)


def test_chunks_are_not_shared(use):
    shared = use(3)
    Case(length=700, count=ROLLBACK + 1).run("compiled")
    here = mx.default_stream(mx.cpu)
    assert shared and all(stream == here for stream, _ in shared)


@pytest.mark.parametrize("kernel", ["eager", "compiled"])
@pytest.mark.parametrize("least, expected", [(1, 3), (2**40, 1)])
def test_several_queries_have_full_precision_tokens_beside_their_codes(
    least, expected, kernel, use, monkeypatch
):
    """Or beside most of their codes, if there are enough for every stream."""
    case = Case(length=2100, count=ROLLBACK)
    use(1)
    alone = case.run(kernel)
    monkeypatch.setattr(pieces, "LEAST_SPLIT", least)
    shared = use(3)
    close(case.run(kernel), np.array(alone), 2e-6)
    assert len({str(stream) for stream, _ in shared}) == expected
    assert expected > 1 or mx.default_stream(mx.cpu) not in [stream for stream, _ in shared]


class _Waiting:
    """``mlx.core`` that counts what is made to wait."""

    def __init__(self):
        self.count = 0

    def __getattr__(self, name):
        return getattr(mx, name)

    def depends(self, *args):
        self.count += 1
        return mx.depends(*args)


@pytest.mark.parametrize("count", [1, 2, ROLLBACK, ROLLBACK + 1])
@pytest.mark.parametrize("streams", [1, 3])
def test_codes_wait_for_full_precision_tokens_where_memory_counts(streams, count, use, monkeypatch):
    waiting = _Waiting()
    monkeypatch.setattr(pieces, "mx", waiting)
    use(streams)
    Case(length=700, count=count).run("compiled")
    assert (waiting.count > 0) == (count > (1 if streams == 1 else ROLLBACK))


def test_few_codes_of_a_single_query_are_not_worth_a_stream(use, monkeypatch):
    shared = use(3)
    monkeypatch.setattr(pieces, "LEAST_SPLIT", 2**40)
    Case(length=700).run("compiled")
    assert [stream for stream, _ in shared] == [mx.default_stream(mx.cpu)]


@pytest.mark.parametrize("part", [ALL, slice(BLOCK, 2 * BLOCK)])
def test_codes_are_made_beside_other_work(part, monkeypatch):
    case, encoding = Case(length=700, extras=True), []
    backend, original = mlx_ops.MLXOps("compiled", compiled=True), type(case.codec).encode

    def encode(*args):
        encoding.append(mx.default_stream(mx.cpu))
        return original(*args)

    start = 3 * BLOCK
    older = original(case.codec, case.keys[:, :, :start], case.values[:, :, :start], 0)
    given = case.codec, case.keys, case.values, start, older, part
    monkeypatch.setattr(type(case.codec), "encode", encode)
    expected = original(*given)
    for helpers in ((), (STREAMS[0],)):
        monkeypatch.setattr(mlx_ops, "helpers", lambda helpers=helpers: helpers)
        for side, other in zip(backend.encode(*given), expected):
            for plane, wanted in zip(side, other):
                np.testing.assert_array_equal(np.array(plane), np.array(wanted))
    first, second = encoding
    assert first == mx.default_stream(mx.cpu) != second


def test_codes_are_made_by_a_gpu_itself(monkeypatch):
    case = Case(length=BLOCK)
    monkeypatch.setattr(mlx_ops.support, "on_gpu", lambda: True)
    monkeypatch.setattr(mlx_ops, "helpers", lambda: pytest.fail("a stream of the CPU"))
    mlx_ops.MLXOps("eager").encode(case.codec, case.keys, case.values, 0)


def test_another_thread_has_streams_of_its_own(use):
    case = Case(length=900)
    use(1)
    alone = np.array(case.run("compiled"))
    shared, found = use(2), []

    def generate():
        for _ in range(3):
            found.append(np.array(case.run("compiled")))

    generate()
    here = {str(stream) for stream, _ in shared}
    shared.clear()
    mx.eval(case.queries, case.keys, case.values)
    thread = threading.Thread(target=generate)
    thread.start()
    thread.join()
    assert len(found) == 6
    for out in found:
        np.testing.assert_allclose(out, alone, atol=2e-6)
    assert here.isdisjoint({str(stream) for stream, _ in shared})


def test_traces_do_not_grow_with_the_splits(use, traced):
    case, shared = Case(length=500, dim=32), use(3)
    cache, traces = case.cache("compiled"), []
    for _ in range(300):
        token = mx.random.normal((1, 2, 1, 32))
        mx.eval(step(cache, case.queries, token, token, case.scale, None))
        traces.append(len(traced))
    assert len(shared) == 900 and traces[-1] == traces[0] > 0


def test_splits_are_whole_blocks_and_the_first_has_the_full_precision_tokens_too():
    splits = pieces._splits(range(0, 10_016), 230, 256, 2)
    assert splits == [range(0, 4864), range(4864, 10_016)]
    assert pieces._splits(range(0, 64), 230, 2**16, 2) == [range(0, 0), range(0, 64)]
    assert pieces._splits(range(32, 352), 230, 128, 4) == [range(32, 352)]
    assert pieces._splits(range(0, 0), 230, 128, 4) == [range(0, 0)]


@pytest.mark.parametrize("cores, expected", [(1, 0), (2, 1), (64, streams.MOST - 1)])
def test_there_are_no_more_streams_than_cores(cores, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    streams.helpers.cache_clear()
    try:
        assert len(streams.helpers()) == expected
    finally:
        streams.helpers.cache_clear()

"""mlx-lm's own caches beside compressed ones in a batch, in every order of arrival."""

import copy

import mlx.core as mx
import pytest
import tiny
from filled_caches import filled, plain, random, ring, same
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

import mlx_turboquant_plugin
from mlx_turboquant_plugin.cache import BatchCompressedKVCache, CompressedKVCache

STEPS = 8


@pytest.fixture
def enabled():
    mlx_turboquant_plugin.enable(invariant=True)


def of_mlx_lm(length=300, max_size=None):
    return filled(KVCache() if max_size is None else RotatingKVCache(max_size, 4), length)


class Requests:
    """Prompts that go on after caches made with the plugin or without; what each gives alone."""

    def __init__(self, max_kv_size, folder):
        self.model, tokenizer = tiny.load("tiny-qwen3")
        self.max_kv_size = max_kv_size
        text = tiny.text_tokens(tokenizer, 800)
        files = []
        for switch, beginnings in (
            (mlx_turboquant_plugin.disable, [text[:330], text[50:90]]),
            (lambda: mlx_turboquant_plugin.enable(invariant=True), [text[7:320], text[11:60]]),
        ):
            switch()
            for tokens in beginnings:
                files.append(str(folder / f"{len(files)}.safetensors"))
                caches = make_prompt_cache(self.model, max_kv_size)
                tiny.logits(self.model, mx.array([tokens]), caches)
                save_prompt_cache(files[-1], caches)
        self.caches = [load_prompt_cache(file) for file in files]
        self.prompts = [text[500:530], text[600:601], text[630:650], text[700:735]]
        self.alone = [
            [
                response.token
                for response in stream_generate(
                    self.model,
                    tokenizer,
                    prompt,
                    max_tokens=STEPS,
                    prompt_cache=copy.deepcopy(cache),
                )
            ]
            for prompt, cache in zip(self.prompts, self.caches)
        ]

    def together(self, order, at_once):
        """What each gives if ``at_once`` of them, in this order, begin at the same time."""
        generator = BatchGenerator(
            self.model,
            max_tokens=STEPS,
            prefill_batch_size=at_once,
            max_kv_size=self.max_kv_size,
        )
        caches = [copy.deepcopy(self.caches[i]) for i in order]
        uids = generator.insert([self.prompts[i] for i in order], caches=caches)
        texts, left = {uid: [] for uid in uids}, {}
        while responses := generator.next_generated():
            for response in responses:
                texts[response.uid].append(response.token)
                if response.finish_reason is not None:
                    left[response.uid] = type(response.prompt_cache[0])
        for number, uid in zip(order, uids):
            # In a batch nothing ends at the end of a text.
            assert texts[uid][: len(self.alone[number])] == self.alone[number]
            assert left[uid] is type(self.caches[number][0])


@pytest.mark.parametrize("max_kv_size", [None, 350])
def test_each_gives_the_text_that_it_gives_alone(max_kv_size, tmp_path):
    requests = Requests(max_kv_size, tmp_path)
    for order, at_once in (
        ((0, 2, 1, 3), 1),
        ((2, 0, 3, 1), 1),
        ((1, 3, 0, 2), 4),
        ((3, 1, 2, 0), 4),
    ):
        requests.together(order, at_once)


@pytest.mark.parametrize("max_size", [None, 200])
@pytest.mark.parametrize("plain_first", [True, False])
def test_the_tokens_stay_as_they_were(enabled, plain_first, max_size):
    pair = [of_mlx_lm(300, max_size), filled(plain() if max_size is None else ring(max_size))]
    empty = pair[0].__class__(*([max_size, 4] if max_size else []))
    pair = pair if plain_first else pair[::-1]
    own = next(cache for cache in pair if not isinstance(cache, CompressedKVCache))
    merged = pair[0].merge([*pair, empty])
    extended = pair[0].merge(pair[:1])
    extended.extend(pair[1].merge(pair[1:]))
    for batch, count in (merged, 3), (extended, 2):
        assert type(batch) is BatchCompressedKVCache
        assert batch.offset.tolist() == [300, 300, 0][:count]
        for index, cache in enumerate([*pair, empty][:count]):
            left = batch.extract(index)
            assert type(left) is type(cache)
            if cache is own and max_size is not None:
                # mlx-lm's batch forgets what rings keep. After a chunk, a ring has more than
                # its newest token sees.
                keep = 0 if batch is extended else 4
                seen = [
                    mx.concatenate([x[:, :, :keep], x[:, :, keep - max_size :]], axis=2)
                    for x in cache.keys_and_values()
                ]
                assert left.keep == keep and same(left.keys_and_values(), seen)
            elif cache is not empty:
                assert same(left.keys_and_values(), cache.keys_and_values())


def test_a_batch_that_goes_on_counts_and_masks_as_mlx_lms(enabled):
    """Layers that aren't compressed have batches of their own, and all share one mask."""
    lengths, count = [5, 80, 33], 4
    x = random(80, 3)
    batches = [BatchKVCache([80 - n for n in lengths]) for _ in range(2)]
    for batch in batches:
        batch.update_and_fetch(*x)
    ours, theirs = batches
    held = ours
    ours.extend(filled(plain(), 50).merge([filled(plain(), 50)]))
    theirs.extend(of_mlx_lm(50).merge([of_mlx_lm(50)]))
    assert held is ours and type(ours) is BatchCompressedKVCache
    for _ in range(2):
        assert ours.offset.tolist() == theirs.offset.tolist()
        assert ours.left_padding.tolist() == theirs.left_padding.tolist()
        assert mx.array_equal(ours.make_mask(3), theirs.make_mask(3))
        for batch in (ours, theirs):
            batch.update_and_fetch(*random(count, 4))


@pytest.mark.parametrize("kind", [BatchKVCache, BatchRotatingKVCache])
def test_rows_that_are_padding_so_far(enabled, kind):
    arguments = () if kind is BatchKVCache else (100,)
    other = filled(plain() if kind is BatchKVCache else ring(100, 0), 40)
    for tokens in (0, 6):
        ours, theirs = kind(*arguments, [9, 2]), kind(*arguments, [9, 2])
        for batch in (ours, theirs) if tokens else ():
            batch.update_and_fetch(*random(tokens, 2))
        ours.extend(other.merge([other]))
        assert ours.offset.tolist() == [*theirs.offset.tolist(), 40]
        assert ours.left_padding.tolist() == [40 - n for n in ours.offset.tolist()]
        row = ours.extract(1)
        assert row.empty() == (tokens == 0)
        if tokens:
            assert same(row.keys_and_values(), theirs.extract(1).keys_and_values())


def test_what_is_left_of_a_batch_may_be_uncompressed(enabled):
    rows = [of_mlx_lm(250), filled(plain(), 250), of_mlx_lm(70)]
    batch, alone = rows[0].merge(rows), [copy.copy(rows[0]), copy.copy(rows[2])]
    batch.filter([0, 2])
    for number in range(40):
        token = random(1, 2, seed=number)
        batch.update_and_fetch(*token)
        for row, cache in enumerate(alone):
            cache.update_and_fetch(*(x[row : row + 1] for x in token))
    for row, cache in enumerate(alone):
        assert same(batch.extract(row).keys_and_values(), cache.keys_and_values())


def test_lists_of_caches_join(enabled):
    lists = [CacheList(KVCache(), of_mlx_lm(20)), CacheList(KVCache(), filled(plain(), 30))]
    merged = CacheList.merge(lists)
    extended = CacheList.merge(lists[:1])
    extended.extend(CacheList.merge(lists[1:]))
    for batch in (merged, extended):
        assert [type(cache) for cache in batch.caches] == [BatchKVCache, BatchCompressedKVCache]
        assert batch.caches[1].offset.tolist() == [20, 30]


@pytest.mark.parametrize("turned", [False, True])
def test_what_can_not_join_changes_nothing(enabled, turned):
    def joined(first, second):
        return (second, first) if turned else (first, second)

    for cache, other, error in (
        (of_mlx_lm(), filled(ring()), "no max_size can't share a batch: .* same max_kv_size"),
        (of_mlx_lm(300, 500), filled(ring(1000)), "1000 and 500 max_size can't share a batch"),
        (of_mlx_lm(300, 500), filled(plain()), "500 and no max_size can't share"),
    ):
        first, second = joined(cache, other)
        with pytest.raises(ValueError, match=error):
            first.merge([first, second])
        batch, added = first.merge([first]), second.merge([second])
        before = type(batch), batch.offset.tolist()
        with pytest.raises(ValueError, match=error):
            batch.extend(added)
        assert (type(batch), batch.offset.tolist()) == before
    batch = BatchKVCache([0, 0])
    batch.prepare(lengths=[3, 5], right_padding=[2, 0])
    first, second = joined(batch, filled(plain()).merge([filled(plain())]))
    with pytest.raises(ValueError, match="finalize"):
        first.extend(second)
    with pytest.raises(TypeError, match="QuantizedKVCache can't join"):
        KVCache.merge([KVCache(), *joined(filled(plain()), QuantizedKVCache())])


def test_without_the_plugin_batches_are_mlx_lms():
    merge, extend = BatchKVCache.__dict__["merge"], BatchKVCache.__dict__["extend"]
    mlx_turboquant_plugin.enable()
    assert BatchKVCache.__dict__["merge"] is not merge
    stock = KVCache.merge([of_mlx_lm(10), of_mlx_lm(20)])
    stock.extend(KVCache.merge([of_mlx_lm(5)]))
    assert type(stock) is BatchKVCache and stock.offset.tolist() == [10, 20, 5]
    mlx_turboquant_plugin.disable()
    assert BatchKVCache.__dict__["merge"] is merge and BatchKVCache.__dict__["extend"] is extend


def test_a_joined_batch_is_saved(enabled):
    batch = KVCache.merge([of_mlx_lm(250), filled(plain(), 240)])
    again = BatchCompressedKVCache.from_state(batch.state)
    assert type(again.extract(0)) is KVCache
    for row in range(2):
        pair = (each.extract(row).keys_and_values() for each in (batch, again))
        assert same(*pair)

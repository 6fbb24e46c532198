"""Caches of layers that have several, in lists of mlx-lm's."""

from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from mlx_turboquant_plugin.cache import CompressedKVCache
from mlx_turboquant_plugin.cache.parts import only_compressed, parts, rebuilt
from mlx_turboquant_plugin.integration.family import placed

STATE, INDEX, KEYS = ArraysCache(1), KVCache(), CompressedKVCache()
NESTED = CacheList(STATE, CacheList(CacheList(KEYS), INDEX))


def test_lists_in_lists():
    assert list(parts(KEYS)) == [KEYS]
    assert list(parts(NESTED)) == [STATE, KEYS, INDEX]
    assert only_compressed([NESTED, INDEX, KEYS]) == [KEYS, KEYS]
    # A state is no attention's.
    assert list(placed(NESTED)) == [(STATE, 0), (KEYS, 0), (INDEX, 1)]


def test_lists_are_rebuilt_as_they_were():
    new = rebuilt(NESTED, lambda part: type(part).__name__)
    first, (keys, last) = new[0], new[1].caches
    assert (first, list(parts(keys)), last) == ("ArraysCache", ["CompressedKVCache"], "KVCache")
    assert type(new) is type(new[1]) is type(keys) is CacheList and NESTED[0] is STATE

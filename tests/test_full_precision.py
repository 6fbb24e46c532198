"""Full-precision tokens are joined when they are read, and by whoever reads them first."""

import mlx.core as mx
import pytest

from mlx_turboquant_plugin.cache.full_precision import FullPrecisionTokens

KEYS, VALUES = mx.random.normal((1, 2, 9, 8)), mx.random.normal((1, 2, 9, 4))
NEW_KEYS, NEW_VALUES = mx.random.normal((1, 2, 3, 8)), mx.random.normal((1, 2, 3, 4))


def concatenated(old, new, drop):
    """``new`` after ``old`` without ``drop`` tokens after two sinks."""
    return mx.concatenate([old[:, :, :2], old[:, :, 2 + drop :], new], axis=2)


@pytest.fixture(params=[0, 5])
def drop(request):
    return request.param


def test_none():
    empty = FullPrecisionTokens()
    assert (empty.keys, empty.values, empty.count) == (None, None, 0)
    first = empty.grown(KEYS, VALUES)
    assert first.keys is KEYS and first.values is VALUES and first.unjoined is None


def test_joined_when_read(drop):
    old = FullPrecisionTokens(KEYS, VALUES)
    tokens = old.grown(NEW_KEYS, NEW_VALUES, 2, drop)
    assert tokens.count == 12 - drop and tokens.dtypes == (mx.float32, mx.float32)
    assert tokens.unjoined is not None
    assert mx.array_equal(tokens.keys, concatenated(KEYS, NEW_KEYS, drop))
    assert mx.array_equal(tokens.values, concatenated(VALUES, NEW_VALUES, drop))
    assert tokens.unjoined is None and tokens.keys is tokens.keys
    assert old.keys is KEYS and old.count == 9


def test_joined_by_another(drop):
    tokens = FullPrecisionTokens(KEYS, VALUES).grown(NEW_KEYS, NEW_VALUES, 2, drop)
    parts = tokens.unjoined
    joined = [
        concatenated(old, new, parts.drop)
        for old, new in ((parts.keys, parts.new_keys), (parts.values, parts.new_values))
    ]
    tokens.join(*joined)
    assert tokens.keys is joined[0] and tokens.values is joined[1]


def test_joined_apart(drop):
    tokens = FullPrecisionTokens(KEYS, VALUES).grown(NEW_KEYS, NEW_VALUES, 2, drop)
    other = tokens.apart()
    assert mx.array_equal(other.keys, concatenated(KEYS, NEW_KEYS, drop))
    assert other.count == tokens.count and other.unjoined is None and tokens.unjoined is not None


@pytest.mark.parametrize("first, last, joins", [(2, 4, False), (0, 4, True), (3, 7, True)])
def test_parts_are_taken_from_older_tokens(first, last, joins):
    tokens = FullPrecisionTokens(KEYS, VALUES).grown(NEW_KEYS, NEW_VALUES, 2, 5)
    keys, values = tokens.part(first, last)
    assert (tokens.unjoined is None) == joins
    assert mx.array_equal(keys, concatenated(KEYS, NEW_KEYS, 5)[:, :, first:last])
    assert mx.array_equal(values, concatenated(VALUES, NEW_VALUES, 5)[:, :, first:last])


def test_another_dtype_is_joined_at_once():
    tokens = FullPrecisionTokens(KEYS, VALUES).grown(
        NEW_KEYS.astype(mx.float16), NEW_VALUES.astype(mx.float16)
    )
    assert tokens.unjoined is None and tokens.dtypes == (mx.float32, mx.float32)

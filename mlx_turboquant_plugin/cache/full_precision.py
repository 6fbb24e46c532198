"""The tokens of a cache that are held as they are."""

from typing import NamedTuple

import mlx.core as mx


class Unjoined(NamedTuple):
    """Older keys and values, (B, H, E, D), and newer ones, (B, H, N, D).

    Of the older ones, the ``drop`` tokens after the first ``sinks`` count no more.
    """

    keys: mx.array
    values: mx.array
    new_keys: mx.array
    new_values: mx.array
    sinks: int
    drop: int


class FullPrecisionTokens:
    """Full-precision keys and values, in the model's dtype, or none at all.

    New tokens are joined to the older ones when they are read. A fused kernel reads both
    and joins them on its way, which saves a step of decoding its copies.

    Logically it never changes: caches, copies of them and views share it.

    Attributes:
        count: E, the number of tokens.
        heads: (B, H), or None.
        dtypes: of the keys and of the values, or None.
    """

    __slots__ = ("_keys", "_unjoined", "_values", "count", "dtypes", "heads")

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None):
        self._keys, self._values = keys, values
        self._unjoined: Unjoined | None = None
        if keys is None:
            self.count, self.heads, self.dtypes = 0, None, None
        else:
            self.count, self.heads = keys.shape[2], keys.shape[:2]
            self.dtypes = keys.dtype, values.dtype

    def grown(
        self, keys: mx.array, values: mx.array, sinks: int = 0, drop: int = 0
    ) -> "FullPrecisionTokens":
        """With new keys and values (B, H, N, D), and without ``drop`` tokens after the sinks.

        New ones of another dtype take that of the older ones, as in KVCache.
        """
        if self.count == 0:
            return FullPrecisionTokens(keys, values)
        converts = (keys.dtype, values.dtype) != self.dtypes
        if converts:
            keys, values = (x.astype(dtype) for x, dtype in zip((keys, values), self.dtypes))
        grown = FullPrecisionTokens()
        grown._unjoined = Unjoined(*self._joined(), keys, values, sinks, drop)
        grown.count = self.count - drop + keys.shape[2]
        grown.heads, grown.dtypes = self.heads, self.dtypes
        return FullPrecisionTokens(*grown._joined()) if converts else grown

    def without(self, sinks: int, drop: int) -> "FullPrecisionTokens":
        """The same without the ``drop`` tokens after the first ``sinks``."""
        keys, values = (
            mx.concatenate([x[:, :, :sinks], x[:, :, sinks + drop :]], axis=2)
            for x in self._joined()
        )
        return FullPrecisionTokens(keys, values)

    def apart(self) -> "FullPrecisionTokens":
        """The same tokens in another object, which can be joined while this one is not."""
        other = FullPrecisionTokens()
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def part(self, first: int, last: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the tokens first, ..., last - 1, which need not be joined for it."""
        keys, values, shift = self._keys, self._values, 0
        unjoined = self._unjoined
        if unjoined is not None:
            keys, values, shift = unjoined.keys, unjoined.values, unjoined.drop
            if first < unjoined.sinks or last + shift > keys.shape[2]:
                (keys, values), shift = self._joined(), 0
        keys, values = (x[:, :, first + shift : last + shift] for x in (keys, values))
        return keys, values

    def before(self, count: int) -> tuple[mx.array, mx.array] | None:
        """Keys and values of all but the newest ``count`` tokens, or None if there are none."""
        older = self.count - count
        if older == 0:
            return None
        unjoined = self._unjoined
        if unjoined is not None and not unjoined.drop and unjoined.new_keys.shape[2] == count:
            return unjoined.keys, unjoined.values
        self._joined()
        return self._keys[:, :, :older], self._values[:, :, :older]

    def replaced(self, keys: mx.array | None, values: mx.array | None) -> "FullPrecisionTokens":
        """The same tokens in other arrays, as ``mx.depends`` makes them.

        Raises:
            ValueError: they have another shape or dtype, or there are no tokens.
        """
        for old, new in zip(self._joined(), (keys, values)):
            if _kind(old) != _kind(new):
                raise ValueError(
                    "the keys and values of a compressed cache are its full-precision tokens, and "
                    f"can only be replaced by the same in other arrays: {_kind(new)} in place "
                    f"of {_kind(old)}; append tokens with update_and_fetch, forget them with trim"
                )
        return FullPrecisionTokens(keys, values)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What it holds now, joined or not."""
        if self._unjoined is not None:
            return self._unjoined[:4]
        return () if self._keys is None else (self._keys, self._values)

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values, joined: reading joins nothing."""
        arrays = self.arrays[:2]
        return sum(x.nbytes // x.shape[2] * self.count for x in arrays if x.shape[2])

    @property
    def unjoined(self) -> Unjoined | None:
        """What is still to be joined, or None."""
        return self._unjoined

    def join(self, keys: mx.array, values: mx.array) -> None:
        """Take ``keys`` and ``values`` (B, H, E, D), which somebody has joined."""
        self._keys, self._values, self._unjoined = keys, values, None

    @property
    def keys(self) -> mx.array:
        """(B, H, E, D); None in an empty cache, which shows no view."""
        return self._joined()[0]

    @property
    def values(self) -> mx.array:
        """As :attr:`keys`."""
        return self._joined()[1]

    def _joined(self) -> tuple[mx.array | None, mx.array | None]:
        unjoined = self._unjoined
        if unjoined is not None:
            pairs = (unjoined.keys, unjoined.new_keys), (unjoined.values, unjoined.new_values)
            self.join(*(_concatenate(*pair, unjoined.sinks, unjoined.drop) for pair in pairs))
        return self._keys, self._values


def _kind(x: mx.array | None) -> str:
    return "none" if x is None else f"{x.shape} {x.dtype}"


def _concatenate(old: mx.array, new: mx.array, sinks: int, drop: int) -> mx.array:
    parts = [old[:, :, sinks + drop :], new] if drop else [old, new]
    if drop and sinks:
        parts.insert(0, old[:, :, :sinks])
    return mx.concatenate(parts, axis=2)

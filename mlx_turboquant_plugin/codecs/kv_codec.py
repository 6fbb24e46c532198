"""How one attention layer's keys and values become codes, and what they are worth."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from .affine import GroupAffine, VectorAffine
from .exact import Exact
from .feedback import feedback
from .key_bias import KeyBias
from .lloyd_max import LloydMax
from .rotation import SEED, Rotation
from .segmented import Segmented

Codes = tuple[mx.array, ...]

# The codec of keys that are cut in two before they are rotated.
SEGMENTED = "segmented"

# Of the tokens of an array.
ALL = slice(None)

# Numbers that are encoded at once: the search for scales keeps many copies of them.
STEP = {mx.cpu: 2**16, mx.gpu: 2**23}


def key_quantizer(name: str, bits: int, *of_segments: mx.array | None):
    """The quantizer of rotated keys called ``name``: segmented, lloyd-max, affine or exact.

    ``of_segments`` are the arguments of :class:`Segmented`.
    """
    if name == SEGMENTED:
        return Segmented(*of_segments)
    return {"lloyd-max": LloydMax, "affine": VectorAffine, "exact": _exact}[name](bits)


def value_quantizer(name: str, bits: int, head_dim: int):
    """The quantizer of rotated values called ``name``: lloyd-max, affine or exact."""
    if name == "affine":
        return GroupAffine(bits, head_dim)
    return {"lloyd-max": LloydMax, "exact": _exact}[name](bits)


def _exact(bits: int) -> Exact:
    return Exact()


class CodecSpec(NamedTuple):
    """What a codec is, apart from the model it serves; written into saved caches.

    ``head_dim`` is that of the keys and ``value_dim`` that of the values.
    """

    head_dim: int
    value_dim: int
    key_codec: str = "lloyd-max"
    key_bits: int = 4
    value_codec: str = "lloyd-max"
    value_bits: int = 3
    seed: int = SEED

    @property
    def dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.head_dim, self.value_dim

    @property
    def segments(self) -> int:
        """Into how many parts, rotated by themselves, a key is cut."""
        return 2 if self.key_codec == SEGMENTED else 1


class Knowledge(NamedTuple):
    """What a codec knows of its layer, see :class:`KVCodec`."""

    balance: mx.array | None = None
    bias: KeyBias | None = None
    layout: mx.array | None = None
    query_squares: mx.array | None = None


class KVCodec:
    """Encodes keys and values of one layer.

    Keys: subtract the rotated bias, divide by the balance, sort, rotate, quantize.
    Values: rotate, quantize. Key codes are channel-major (..., C, T), which is
    what a query multiplies; value codes are token-major (..., T, C).

    Args:
        spec: bits, quantizers, dimensions.
        balance: (H, 1, D) fp32, or None: queries are multiplied by it and keys divided.
        bias: the layer's key bias, or None.
        layout: (H, D + 1) int32, or None: the channels of each KV head in the order in which
            they are cut into segments, and last the bits of the first segment.
        query_squares: (H, D) fp32, the mean squares of the queries of each KV head, or None: errors
            of keys in segments are fed back by them. Codes mean the same with and without.
    """

    def __init__(
        self,
        spec: CodecSpec,
        balance: mx.array | None = None,
        bias: KeyBias | None = None,
        layout: mx.array | None = None,
        query_squares: mx.array | None = None,
    ):
        self.spec = spec
        self._given = Knowledge(balance, bias, layout, query_squares)
        self._learn: Callable[[CodecSpec], Knowledge] | None = None
        # What kernels have made of it for themselves, each with its ``arrays``.
        self.derived: dict[str, Any] = {}
        self.values = value_quantizer(spec.value_codec, spec.value_bits, spec.value_dim)
        self.key_rotation = Rotation(spec.head_dim // spec.segments, spec.seed)
        self.value_rotation = Rotation(spec.value_dim, spec.seed)

    @classmethod
    def learning(cls, spec: CodecSpec, learn: Callable[[CodecSpec], Knowledge]) -> "KVCodec":
        """A codec that asks ``learn(spec)`` for what it knows of its layer when it needs that.

        That is when it makes or reads its first codes.
        """
        codec = cls(spec)
        codec._learn = learn
        return codec

    def with_spec(self, spec: CodecSpec) -> "KVCodec":
        """What ``spec`` says, for the same layer."""
        if spec == self.spec:
            return self
        codec = KVCodec(spec, *self._given)
        codec._learn = self._learn
        return codec

    @property
    def plain(self) -> "KVCodec":
        """One that knows nothing of the layer, for what has no codes."""
        return KVCodec(self.spec)

    @functools.cached_property
    def _known(self) -> Knowledge:
        return self._given if self._learn is None else self._learn(self.spec)

    def learn(self) -> None:
        """Learn now what the first codes will need."""
        _ = self._known  # Kept from now on.

    @property
    def informed(self) -> bool:
        """Whether it knows anything of its layer by now."""
        known = self._given if self._learn is None else vars(self).get("_known", Knowledge())
        return any(x is not None for x in known)

    @property
    def balance(self) -> mx.array | None:
        return self._known.balance

    @property
    def bias(self) -> KeyBias | None:
        return self._known.bias

    @property
    def layout(self) -> mx.array | None:
        return self._known.layout

    @property
    def query_squares(self) -> mx.array | None:
        return self._known.query_squares

    @functools.cached_property
    def feedback(self) -> mx.array | None:
        """How errors are fed back when codes are made, see :func:`feedback`; None: not at all."""
        if self.query_squares is None or self.layout is None:
            return None
        return feedback(self.query_squares, self.balance, self.layout, self.key_rotation)

    @functools.cached_property
    def keys(self):
        """The quantizer of rotated keys."""
        first_bits = None if self.layout is None else self.layout[:, -1]
        return key_quantizer(self.spec.key_codec, self.spec.key_bits, first_bits, self.feedback)

    def makes_the_codes_of(self, other: "KVCodec", bias: mx.array | None) -> bool:
        """Whether codes made by ``other``, which leave out a key bias (H, D), are its own."""
        return (
            self.spec == other.spec
            and _equal(self.bias.bias if self.bias else None, bias)
            and _equal(self.balance, other.balance)
            and _equal(self.layout, other.layout)
        )

    @property
    def tables(self) -> tuple[mx.array, ...]:
        """What it keeps besides any codes. Layers share the rotations and the rotary table."""
        tables = [self.key_rotation.array, self.value_rotation.array]
        known = self.balance, self.layout, self.query_squares, self.feedback
        tables += [x for x in known if x is not None]
        if self.bias is not None:
            tables += [*self.bias.arrays, *self.bias.table.arrays]
        return *tables, *(x for made in self.derived.values() for x in made.arrays)

    @property
    def checksum(self) -> int:
        """Of both rotations: tells whether codes from elsewhere mean the same here."""
        return _checksum(self.key_rotation, self.value_rotation)

    def encode(
        self,
        keys: mx.array,
        values: mx.array,
        start: int,
        older: tuple[Codes, Codes] = ((), ()),
        part: slice = ALL,
    ) -> tuple[Codes, Codes]:
        """Codes of keys and of values: see :meth:`encode_keys` and :meth:`encode_values`."""
        return (
            self.encode_keys(keys, start, older[0], part),
            self.encode_values(values, older[1], part),
        )

    def encode_keys(
        self, keys: mx.array, start: int, older: Codes = (), part: slice = ALL
    ) -> Codes:
        """Codes of ``keys`` (B, H, T, D), rotary positions start, start + 1, ...

        Args:
            older: the codes of the tokens before them, which go before.
            part: which of the T tokens; ``start`` is the position of the first of these.
        """

        def encode(x, first):
            x = x.astype(mx.float32)
            if self.bias is not None:
                x = x - self.bias.rotated(start + first, x.shape[2])
            if self.balance is not None:
                x = x / self.balance
            codes = self.keys.encode(self._rotate(self.sorted(x)))
            # A kernel copies what is not contiguous, and attention reads codes on every step.
            return tuple(mx.contiguous(mx.swapaxes(plane, -1, -2)) for plane in codes)

        return joined(older, _in_steps(encode, keys[:, :, part], axis=-1), axis=-1)

    def decode_keys(self, codes: Codes, start: int) -> mx.array:
        """The keys, fp32 (B, H, T, D), that ``codes`` stand for."""
        x = self.keys.decode(tuple(mx.swapaxes(plane, -1, -2) for plane in codes))
        x = Rotation.inverse(self._cut(x), self.key_rotation.array).flatten(-2)
        if self.layout is not None:
            x = _chosen(x, mx.argsort(self.layout[:, :-1], axis=-1))
        if self.balance is not None:
            x = x * self.balance
        if self.bias is not None:
            x = x + self.bias.rotated(start, x.shape[2])
        return x

    def sorted(self, x: mx.array) -> mx.array:
        """Keys or queries (B, H, T, D) with their channels in the order of the segments."""
        return x if self.layout is None else _chosen(x, self.layout[:, :-1])

    def _cut(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], self.spec.segments, -1)

    def _rotate(self, x: mx.array) -> mx.array:
        return Rotation.forward(self._cut(x), self.key_rotation.array).flatten(-2)

    def encode_values(self, values: mx.array, older: Codes = (), part: slice = ALL) -> Codes:
        """Codes of ``values`` (B, H, T, D); ``older`` and ``part`` as in :meth:`encode_keys`."""

        def encode(x, first):
            x = x.astype(mx.float32)
            return self.values.encode(Rotation.forward(x, self.value_rotation.array))

        return joined(older, _in_steps(encode, values[:, :, part], axis=-2), axis=-2)

    def decode_values(self, codes: Codes) -> mx.array:
        """The values, fp32 (B, H, T, D), that ``codes`` stand for."""
        return Rotation.inverse(self.values.decode(codes), self.value_rotation.array)


def _equal(a: mx.array | None, b: mx.array | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or bool(mx.array_equal(a, b))


def _chosen(x: mx.array, channels: mx.array) -> mx.array:
    """The ``channels`` (H, D) of vectors (B, H, T, D)."""
    return mx.take_along_axis(x, mx.broadcast_to(channels[:, None], x.shape), axis=-1)


@functools.cache
def _checksum(*rotations: Rotation) -> int:
    return zlib.crc32(b"".join(rotation.fingerprint() for rotation in rotations))


def joined(older: Codes, newer: Codes, axis: int) -> Codes:
    """The codes of both, or of the newer ones if there are no others."""
    if not older:
        return newer
    return tuple(mx.concatenate(list(pair), axis=axis) for pair in zip(older, newer))


def _in_steps(encode: Callable, x: mx.array, axis: int) -> Codes:
    """Codes of ``x`` (B, H, T, D), made for some tokens at a time and joined along ``axis``."""
    batch, heads, length, dim = x.shape
    tokens = max(32, STEP[mx.default_device().type] // (batch * heads * dim))
    steps: list[Codes] = []
    for first in range(0, length, tokens):
        part = x[:, :, first : first + tokens]
        if steps:
            # One after the other, or all of them would be in memory at once.
            part = mx.depends(part, steps[-1])
        steps.append(encode(part, first))
    if len(steps) == 1:
        return steps[0]
    return tuple(mx.concatenate(list(parts), axis=axis) for parts in zip(*steps))

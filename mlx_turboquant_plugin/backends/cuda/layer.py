"""What the attention kernels read of a layer, in few arrays: each costs time at every launch."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...codecs.key_bias import RotaryTable
from ...codecs.kv_codec import CodecSpec, KVCodec
from ...codecs.rotation import Rotation
from ..inputs import PairLayout, pair_layout


@dataclass(frozen=True, eq=False)
class Kind:
    """What the source of the kernels depends on; one object, which hashes fast, for equal layers.

    Attributes:
        rotations: fp32, of the values and then of the keys.
        balanced, ordered: whether there are a balance and a layout, see :class:`KVCodec`.
        pairs: those of the key bias; no pairs without one.
    """

    spec: CodecSpec
    rotations: mx.array
    balanced: bool
    ordered: bool
    pairs: PairLayout


@functools.cache
def _kind(
    spec: CodecSpec,
    value_rotation: Rotation,
    key_rotation: Rotation,
    balanced: bool,
    ordered: bool,
    pairs: PairLayout,
) -> Kind:
    rotations = side_by_side(value_rotation.array, key_rotation.array)
    return Kind(spec, rotations, balanced, ordered, pairs)


class Layer(NamedTuple):
    """A layer, as ``split.cu`` and ``merge.cu`` read it.

    Attributes:
        known: one array or none: the balance, the key bias and the layout, as far as there are
            any, fp32 and int32 as it is.
        table: of the key bias, or None.
    """

    kind: Kind
    known: tuple[mx.array, ...]
    table: RotaryTable | None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.kind.rotations, *self.known


def layer_of(codec: KVCodec) -> Layer:
    """The layer of a codec, which keeps it."""
    layer = codec.derived.get("cuda")
    if layer is None:
        layer = codec.derived["cuda"] = _layer(codec)
    return layer


def _layer(codec: KVCodec) -> Layer:
    balance, layout = codec.balance, codec.layout
    bias, table = (codec.bias.bias, codec.bias.table) if codec.bias else (None, None)
    pairs = pair_layout(table) if table else PairLayout()
    known = [x for x in (balance, bias, layout) if x is not None]
    rotations = codec.value_rotation, codec.key_rotation
    kind = _kind(codec.spec, *rotations, balance is not None, layout is not None, pairs)
    return Layer(kind, (side_by_side(*known),) if known else (), table)


def side_by_side(*arrays: mx.array | np.ndarray) -> mx.array:
    """Arrays of words of 32 bits as one of fp32, without a change of any bit."""
    # By way of NumPy, since lazy arrays must not be shared by threads.
    return mx.array(np.concatenate([np.array(x).view(np.float32).ravel() for x in arrays]))

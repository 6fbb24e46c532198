"""The part of a key that is known exactly: the rotated bias of ``k_proj``.

RoPE is linear, so key_t = R_t (W x_t) + R_t b. Qwen2-like models carry a bias b
that is tens of times larger than the rest of the key; quantising it drowns
everything else. Only r_t = key_t - R_t b is quantised, and a query's product with
R_t b is added to its scores:

    q . R_t b = sum_f cos(theta_f t) (q1 b1 + q2 b2) + sin(theta_f t) (q2 b1 - q1 b2)

over the rotary pairs (1, 2) with the angles theta_f of the model's own rope object.
"""

import weakref
from typing import Any, Tuple

import mlx.core as mx

# Angles are split as theta (BLOCK a + b): two small tables instead of one as long
# as the sequence, and the same number of multiplications.
BLOCK = 128


class RotaryTable:
    """cos(theta_f t) and sin(theta_f t) of a rope object, for any position t.

    Args:
        rope: called as ``rope(x, offset=int or array)`` on (B, H, T, D); None for
            layers without rotary positions.
        head_dim: D.

    Raises:
        ValueError: the rope object is not one rotation per position (its angles
            depend on more than the position).
    """

    def __init__(self, rope: Any, head_dim: int):
        self.head_dim = head_dim
        self._rope = rope if rope is not None else (lambda x, offset: x)
        rotated = getattr(rope, "dims", getattr(rope, "dim", head_dim))
        if getattr(rope, "traditional", False):
            self.first = mx.arange(0, rotated, 2)
            self.second = self.first + 1
        else:
            self.first = mx.arange(rotated // 2)
            self.second = self.first + rotated // 2
        self.rest = mx.arange(rotated, head_dim)
        cos, sin = self._angles(mx.arange(BLOCK))
        magnitude = mx.sqrt(cos[:1] ** 2 + sin[:1] ** 2)
        self.fine = mx.concatenate([cos / magnitude, sin / magnitude], axis=-1)
        self.coarse = self._angles(mx.arange(8) * BLOCK)
        mx.eval(self.arrays)

    @property
    def arrays(self) -> Tuple[mx.array, ...]:
        return self.first, self.second, self.rest, self.fine, *self.coarse

    def blocks(self, count: int) -> Tuple[mx.array, mx.array]:
        """(cos, sin), fp32 (count, F), at the positions 0, BLOCK, 2 BLOCK, ..."""
        have = self.coarse[0].shape[0]
        if count > have:
            self.coarse = self._angles(mx.arange(max(count, 2 * have)) * BLOCK)
            mx.eval(self.coarse)
        cos, sin = self.coarse
        return cos[:count], sin[:count]

    def _angles(self, positions: mx.array) -> Tuple[mx.array, mx.array]:
        # RoPE turns the pair (1, 0) into (cos, sin).
        probe = mx.zeros((self.head_dim,))
        probe[self.first] = 1.0
        # Whole arrays: MLX's rope on CUDA writes its output with the strides of its input.
        probe = mx.contiguous(
            mx.broadcast_to(probe, (positions.shape[0], 1, 1, self.head_dim))
        )
        turned = self._rope(probe, offset=positions)[:, 0, 0]
        return turned[:, self.first], turned[:, self.second]


_tables: "weakref.WeakValueDictionary[tuple, RotaryTable]" = weakref.WeakValueDictionary()


def shared_table(rope: Any, head_dim: int) -> RotaryTable:
    """The table of a rope object, one for all layers that turn by the same angles."""
    table = RotaryTable(rope, head_dim)
    key = (head_dim, *map(bytes, (table.first, table.fine, *table.coarse)))
    return _tables.setdefault(key, table)


class KeyBias:
    """One layer's key bias, rotated to any position.

    Args:
        bias: (H, D), the k_proj bias of each KV head.
        rope: the layer's rope object, or None.

    Raises:
        ValueError: rotating the bias by the table does not agree with ``rope``.
    """

    def __init__(self, bias: mx.array, rope: Any):
        self.bias = bias.astype(mx.float32)
        try:
            self.table = RotaryTable(rope, bias.shape[-1])
            agrees = all(self._agrees(rope, position) for position in (1, 300, 70_001))
        except (TypeError, ValueError):
            # It does not take one offset for each sequence.
            agrees = False
        if not agrees:
            raise ValueError(
                f"the key bias can't be separated from keys rotated by {type(rope).__name__}: "
                "its angles depend on more than the position"
            )
        # Not the table above, which has grown by looking far ahead.
        self.table = shared_table(rope, bias.shape[-1])
        mx.eval(self.bias)

    def rotated(self, start: int, count: int) -> mx.array:
        """R_t b for the positions start, ..., start + count - 1: fp32 (H, count, D)."""
        table = self.table
        first_block = start // BLOCK
        blocks = (start + count - 1) // BLOCK + 1
        a_cos, a_sin = (x[first_block:, None] for x in table.blocks(blocks))
        b_cos, b_sin = mx.split(table.fine[None], 2, axis=-1)
        skip = start - first_block * BLOCK
        pairs = table.first.shape[0]
        cos = (a_cos * b_cos - a_sin * b_sin).reshape(-1, pairs)[skip : skip + count]
        sin = (a_sin * b_cos + a_cos * b_sin).reshape(-1, pairs)[skip : skip + count]
        b1 = self.bias[:, None, table.first]
        b2 = self.bias[:, None, table.second]
        out = mx.broadcast_to(self.bias[:, None], (self.bias.shape[0], count, table.head_dim))
        out = mx.contiguous(out)
        out[..., table.first] = b1 * cos - b2 * sin
        out[..., table.second] = b1 * sin + b2 * cos
        return out

    def scores(self, q: mx.array, start: int, count: int) -> mx.array:
        """q . R_t b for ``count`` positions from ``start``: (B, H, R, D) -> fp32 (B, H, R, count)."""
        table = self.table
        q1, q2 = q[..., table.first], q[..., table.second]
        b1, b2 = self.bias[:, None, table.first], self.bias[:, None, table.second]
        c = (q1 * b1 + q2 * b2)[..., None, :]
        s = (q2 * b1 - q1 * b2)[..., None, :]
        cos, sin = table.blocks((start + count - 1) // BLOCK + 1)
        turned = mx.concatenate([c * cos + s * sin, s * cos - c * sin], axis=-1)
        scores = _multiply(turned, table.fine.T).flatten(-2)[..., start : start + count]
        if table.rest.size:
            rest = q[..., table.rest] * self.bias[:, None, table.rest]
            scores = scores + mx.sum(rest, axis=-1, keepdims=True)
        return scores

    def _agrees(self, rope: Any, position: int) -> bool:
        x = self.bias[None, :, None]
        expected = rope(x, offset=position)[0] if rope is not None else x[0]
        error = mx.abs(self.rotated(position, 1) - expected).max()
        return error.item() <= 0.02 * mx.abs(self.bias).max().item()


def _multiply(a: mx.array, b: mx.array) -> mx.array:
    """``a @ b`` as exact as fp32 is, also where MLX rounds factors to TF32.

    On a GPU it may; the bias makes scores of hundreds, of which 2^-11 is not nothing.
    There each factor is the sum of two in TF32, and all but the product of the small
    ones are added up (Ootomo and Yokota 2022, arXiv 2203.03341).
    """
    if mx.default_device().type == mx.cpu:
        return a @ b
    (a, small_a), (b, small_b) = _split(a), _split(b)
    return mx.concatenate([a, a, small_a], axis=-1) @ mx.concatenate([b, small_b, b], axis=-2)


def _split(x: mx.array) -> Tuple[mx.array, mx.array]:
    """``x`` as a number of at most 11 bits, which TF32 holds, and the rest."""
    large = (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)
    return large, x - large

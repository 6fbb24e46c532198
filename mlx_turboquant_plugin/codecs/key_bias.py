"""The part of a key that is known exactly: the rotated mean of a head's keys before RoPE.

RoPE is linear, so key_t = R_t (x_t - b) + R_t b, for any b: the mean of the x_t, or, where it was
not measured, the bias of ``k_proj``. It is most of the energy of the keys, and with Qwen2-like
models tens of times larger than the rest; quantizing it drowns everything else. Only
r_t = key_t - R_t b is quantized, and a query's product with R_t b is added to its scores:

    q . R_t b = sum_f cos(theta_f t) (q1 b1 + q2 b2) + sin(theta_f t) (q2 b1 - q1 b2)

over the rotary pairs (1, 2) with the angles theta_f of the model's own rope object.
"""

import weakref
from typing import Any

import mlx.core as mx
import numpy as np

from ..compiling import compiled

# Angles are split as theta (BLOCK a + b): two small tables instead of one as long
# as the sequence, and the same number of multiplications.
BLOCK = 128

# Where small arrays are made that stay: on NVIDIA GPUs MLX compiles each kind of gather and
# scatter first, for seconds.
SETUP = mx.cpu

# Of the cosines and the sines of each pair, fp32 (B, H, R, 1, F), and what the channels
# that are not rotated add to every score, (B, H, R, 1), if there are any.
Coefficients = tuple[mx.array, mx.array, mx.array | None]


class RotaryTable:
    """cos(theta_f t) and sin(theta_f t) of a rope object, for any position t.

    Args:
        rope: called as ``rope(x, offset=int or array)`` on (B, H, T, D); None for
            layers without rotary positions.
        head_dim: D.

    Attributes:
        dims: how many channels are rotated; they come first.
        traditional: whether the channels of a pair are neighbours, not half of ``dims`` apart.
        fine: cosines and then sines at the first BLOCK positions, fp32 (2 F, BLOCK).
        even, odd: the cosines, and the sines, at the positions 0 to BLOCK / 2.
        middle: (cos, sin) at the position BLOCK / 2, (F,).
        coarse: (cos, sin) at the positions 0, BLOCK, 2 BLOCK, ..., fp32 (count, F), as far as
            needed so far.
        derived: what kernels have made of it for themselves; forgotten when it grows.
        agreeing: the types of ropes that were seen to turn like this at far positions, too.

    Raises:
        ValueError: the rope object is not one rotation per position (its angles
            depend on more than the position).
    """

    def __init__(self, rope: Any, head_dim: int):
        self.head_dim = head_dim
        self.derived: dict[Any, tuple[mx.array, ...]] = {}
        self.agreeing: set[type] = set()
        self._rope = rope if rope is not None else (lambda x, offset: x)
        with mx.stream(SETUP):
            self._set_up(rope)

    def _set_up(self, rope: Any) -> None:
        head_dim = self.head_dim
        self.dims = getattr(rope, "dims", getattr(rope, "dim", head_dim))
        self.traditional = getattr(rope, "traditional", False)
        half = BLOCK // 2
        cos, sin = self._turns(half)
        # Rows of positions: MLX's CPU matmul is slow with columns of them.
        self.fine = mx.array(np.concatenate([cos, sin]))
        self.even, self.odd = (mx.array(x[:, : half + 1]) for x in (cos, sin))
        self.middle = mx.array(cos[:, half]), mx.array(sin[:, half])
        self._blocks = 8
        self.coarse = self._angles(mx.arange(self._blocks) * BLOCK)
        mx.eval(self.arrays)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        fixed = self.fine, self.even, self.odd, *self.middle
        derived = (x for arrays in self.derived.values() for x in arrays)
        return *fixed, *self.coarse, *derived

    def reach(self, count: int) -> None:
        """Have ``coarse`` hold the angles of ``count`` blocks: it doubles when it grows."""
        if count > self._blocks:
            blocks = max(count, 2 * self._blocks)
            with mx.stream(SETUP):
                self.coarse = self._angles(mx.arange(blocks) * BLOCK)
                mx.eval(self.coarse)
            self.derived = {}
            self._blocks = blocks

    def blocks(self, count: int) -> tuple[mx.array, mx.array]:
        """(cos, sin), fp32 (count, F), at the positions 0, BLOCK, 2 BLOCK, ..."""
        self.reach(count)
        cos, sin = self.coarse
        return cos[:count], sin[:count]

    def turned_back(self, x: mx.array) -> mx.array:
        """Vectors (..., T, D) at the positions 0, ..., T - 1 as they were before RoPE."""
        cos, sin = self._angles(mx.arange(x.shape[-2]))
        square = cos**2 + sin**2
        one, two, rest = self.pairs(x)
        one, two = one * cos + two * sin, two * cos - one * sin
        return self.joined(one / square, two / square, rest)

    def pairs(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Both channels of each pair of ``x`` (..., D), (..., F) each, and the other channels."""
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        if self.traditional:
            return turned[..., ::2], turned[..., 1::2], rest
        return *mx.split(turned, 2, axis=-1), rest

    def joined(self, one: mx.array, two: mx.array, rest: mx.array) -> mx.array:
        """What :meth:`pairs` took apart."""
        pair = [one, two]
        if self.traditional:
            pair = [mx.stack(pair, axis=-1).flatten(-2)]
        return mx.concatenate([*pair, rest], axis=-1)

    def pair_sums(self, x: mx.array) -> mx.array:
        """Sums over the two channels of each pair: (..., dims) to (..., F)."""
        shape = (-1, 2) if self.traditional else (2, x.shape[-1] // 2)
        return mx.sum(x.reshape(*x.shape[:-1], *shape), axis=-1 if self.traditional else -2)

    def _turns(self, far: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin at the first positions, fp32 (F, BLOCK), of magnitude 1 whatever the rope's.

        Multiples of one angle, found by the turns at the positions 1 and ``far``: the rope's own
        are rounded, each in another way, and so would be sums of them.
        """
        cos, sin = (np.array(x, np.float64) for x in self._angles(mx.array([1, far])))
        one, many = np.angle(cos + 1j * sin)
        angle = (many + 2 * np.pi * np.round((far * one - many) / (2 * np.pi))) / far
        turns = np.exp(1j * angle[:, None] * np.arange(BLOCK))
        return turns.real.astype(np.float32), turns.imag.astype(np.float32)

    def _angles(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        # RoPE turns the pair (1, 0) into (cos, sin).
        count = self.dims // 2
        probe = self.joined(mx.ones(count), mx.zeros(count), mx.zeros(self.head_dim - self.dims))
        # Whole arrays: MLX's rope on CUDA writes its output with the strides of its input.
        probe = mx.contiguous(mx.broadcast_to(probe, (positions.shape[0], 1, 1, self.head_dim)))
        return self.pairs(self._rope(probe, offset=positions)[:, 0, 0])[:2]


_tables: "weakref.WeakValueDictionary[tuple, RotaryTable]" = weakref.WeakValueDictionary()


def shared_table(rope: Any, head_dim: int) -> RotaryTable:
    """The table of a rope object, one for all layers that turn by the same angles."""
    table = RotaryTable(rope, head_dim)
    key = (head_dim, table.traditional, *map(bytes, (table.fine, *table.coarse)))
    return _tables.setdefault(key, table)


class KeyBias:
    """One layer's key bias, rotated to any position.

    Args:
        bias: (H, D), the mean, or the k_proj bias, of each KV head.
        rope: the layer's rope object, or None.

    Raises:
        ValueError: rotating the bias by the table does not agree with ``rope``.
    """

    def __init__(self, bias: mx.array, rope: Any):
        with mx.stream(SETUP):
            self._set_up(bias.astype(mx.float32), rope)

    def _set_up(self, bias: mx.array, rope: Any) -> None:
        self.bias = bias
        try:
            self.table = shared_table(rope, bias.shape[-1])
            agrees = type(rope) in self.table.agreeing or self._agrees(rope)
        except (TypeError, ValueError):
            # It does not take one offset for each sequence.
            agrees = False
        if not agrees:
            raise ValueError(
                f"the key bias can't be separated from keys rotated by {type(rope).__name__}: "
                "its angles depend on more than the position"
            )
        b1, b2, rest = self.table.pairs(self.bias)
        # Of cosines and of sines: (q1, q2) times (b1, b2) and times (-b2, b1).
        crossed = self.table.joined(-b2, b1, rest)
        factors = mx.stack([self.bias, crossed], axis=1)[:, None, :, : self.table.dims]
        self._factors = mx.contiguous(factors)
        mx.eval(self.bias, self._factors)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What one layer keeps for its bias, besides the table."""
        return self.bias, self._factors

    def rotated(self, start: int, count: int) -> mx.array:
        """R_t b for the positions start, ..., start + count - 1: fp32 (H, count, D)."""
        table = self.table
        first_block = start // BLOCK
        blocks = (start + count - 1) // BLOCK + 1
        a_cos, a_sin = (x[first_block:, None] for x in table.blocks(blocks))
        b_cos, b_sin = mx.split(table.fine.T[None], 2, axis=-1)
        skip = start - first_block * BLOCK
        pairs = table.dims // 2
        cos = (a_cos * b_cos - a_sin * b_sin).reshape(-1, pairs)[skip : skip + count]
        sin = (a_sin * b_cos + a_cos * b_sin).reshape(-1, pairs)[skip : skip + count]
        b1, b2, rest = table.pairs(self.bias[:, None])
        rest = mx.broadcast_to(rest, (rest.shape[0], count, rest.shape[2]))
        return table.joined(b1 * cos - b2 * sin, b1 * sin + b2 * cos, rest)

    def coefficients(self, q: mx.array) -> Coefficients:
        """What :meth:`scores` takes for queries ``q``, fp32 (B, H, R, D)."""
        table = self.table
        products = q[..., None, : table.dims] * self._factors
        sums = table.pair_sums(products)
        pairs = _turn(sums[..., :1, :], sums[..., 1:, :], *table.middle)
        rest = None
        if table.dims < table.head_dim:
            rest = q[..., table.dims :] * self.bias[:, None, table.dims :]
            rest = mx.sum(rest, axis=-1, keepdims=True)
        return *pairs, rest

    def scores(self, coefficients: Coefficients, start: int, count: int) -> mx.array:
        """q . R_t b for ``count`` positions from ``start``, fp32 (B, H, R, count)."""
        *pairs, rest = coefficients
        first_block = start // BLOCK
        coarse = self.table.blocks((start + count - 1) // BLOCK + 1)
        blocks = self._around(*_turn(*pairs, *(x[first_block:] for x in coarse)))
        skip = start - first_block * BLOCK
        scores = blocks.flatten(-2)[..., skip : skip + count]
        return scores if rest is None else scores + rest

    def _around(self, c: mx.array, s: mx.array) -> mx.array:
        """Scores of blocks, given their coefficients at the middle.

        Cosines are even and sines odd: half the multiplications do.
        """
        half = BLOCK // 2
        even, odd = c @ self.table.even, s @ self.table.odd
        before, after = (even - odd)[..., :0:-1], (even + odd)[..., :half]
        return mx.concatenate([before, after], axis=-1)

    def _agrees(self, rope: Any) -> bool:
        shared, largest = self.table, float(mx.abs(self.bias).max())
        # Looking far ahead makes a table grow.
        self.table = RotaryTable(rope, self.bias.shape[-1])
        errors = [self._error(rope, position) for position in (1, 300, 70_001)]
        self.table = shared
        if not max(errors) <= 0.02 * largest:
            return False
        if largest > 0:
            shared.agreeing.add(type(rope))
        return True

    def _error(self, rope: Any, position: int) -> float:
        x = self.bias[None, :, None]
        expected = rope(x, offset=position)[0] if rope is not None else x[0]
        return float(mx.abs(self.rotated(position, 1) - expected).max())


@compiled
def _turn(c: mx.array, s: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    """Coefficients (..., 1, F) for positions that are counted from where the angles are."""
    return c * cos + s * sin, s * cos - c * sin

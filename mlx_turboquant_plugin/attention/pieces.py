"""Attention over full-precision tokens and pieces of codes, split among streams if that pays."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.visibility import BLOCK, ROLLBACK
from ..codecs.kv_codec import KVCodec
from ..streams import helpers
from .function import AttentionFunctions, Sums, attention_functions

# Quantized tokens that tiles of queries dequantize at once: their scores should stay in the
# processor's cache.
PIECE = 512
# A single query has so few scores that the numbers of its keys count, of all rows and heads.
SINGLE_QUERY = 2**20
LEAST_PIECE = 256
# Numbers of keys for which another stream is worth its operations, which all have to be
# described and scheduled by one thread.
LEAST_SPLIT = 2**17


class FullPrecision(NamedTuple):
    """Full-precision tokens to attend to: keys and values (B, H, E, D), and their mask or None."""

    keys: mx.array
    values: mx.array
    mask: mx.array | None


class Quantized(NamedTuple):
    """Quantized tokens to attend to.

    Attributes:
        codec: what made them.
        codes: ``f(first, last)`` gives the codes of the positions first, ..., last - 1.
        positions: which tokens to attend to, without those before ``oldest``.
        mask: of these tokens, (..., len(positions)), or None; it hides those, too.
    """

    codec: KVCodec
    codes: Callable
    positions: range
    oldest: int
    mask: mx.array | None


def attend_codes(
    queries: mx.array,
    full: FullPrecision,
    quantized: Quantized,
    scale: float,
    functions: AttentionFunctions,
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attention over full-precision tokens and quantized ones.

    Args:
        queries: (B, H_q, N, D).
        learned_sinks: for each query head, (H_q,), the score of one more token whose
            value is zero (GPT-OSS), or None.

    Returns:
        (B, H_q, N, D_v) in the dtype of the queries.
    """
    codec = quantized.codec
    batch, heads, count, dim = queries.shape
    kv_heads = full.keys.shape[1]
    # All queries that share a KV head are rows of one matrix product.
    q = queries.astype(mx.float32).reshape(batch, kv_heads, -1, dim) * scale
    if learned_sinks is not None:
        learned_sinks = mx.repeat(learned_sinks.astype(mx.float32), count)
        learned_sinks = learned_sinks.reshape(kv_heads, -1, 1)
    held = full.keys.shape[2]
    full_sums = _for(held, codec, functions).begin(q, *full, learned_sinks)
    sums: list[Sums] = []
    if quantized.positions:
        sums = _over_codes(q, full_sums, quantized, count, held, functions)
    out = functions.finish(full_sums, sums, codec.value_rotation.array)
    return out.reshape(batch, heads, count, -1).astype(queries.dtype)


def _over_codes(
    q: mx.array, full_sums: Sums, quantized: Quantized, count: int, held: int, functions
) -> list[Sums]:
    """Running sums over splits of the quantized tokens.

    Args:
        q: (B, H, R, D), scaled, of ``count`` positions.
        full_sums: those over the ``held`` full-precision tokens.
    """
    codec = quantized.codec
    balanced = q if codec.balance is None else q * codec.balance
    rotated = functions.rotate(codec.sorted(balanced), codec.key_rotation.array)
    bias = None if codec.bias is None else codec.bias.coefficients(q)
    streams = helpers() if count <= ROLLBACK else ()
    if count > 1 and not streams:
        # Before the codes, or all scores of a tile would be in memory at once.
        rotated = mx.depends(rotated, full_sums)
    batch, kv_heads, _, dim = q.shape
    channels = batch * kv_heads * dim
    piece = _piece_size(count, channels)
    splits = _splits(quantized.positions, held, channels, 1 + len(streams))
    if count > 1 and streams and len(splits) == 1:
        # The full-precision tokens of several queries are enough for one stream.
        splits.insert(0, quantized.positions[:0])
    sums = []
    for split, stream in zip(splits, (None, *streams)):
        if split:
            with nullcontext() if stream is None else mx.stream(stream):
                sums.append(_fold_pieces(rotated, bias, quantized, split, piece, functions))
    return sums


def _piece_size(queries: int, channels: int) -> int:
    """How many quantized tokens of each row to dequantize at once.

    Args:
        channels: of the keys of one token, all rows and heads together.
    """
    if queries > 1:
        return PIECE
    return max(LEAST_PIECE, SINGLE_QUERY // channels // BLOCK * BLOCK)


def _splits(positions: range, full: int, channels: int, streams: int) -> list[range]:
    """``positions`` in runs of whole blocks, for at most so many streams.

    The first may be empty: its stream has the ``full`` tokens as well.
    """
    streams = max(1, min(streams, len(positions) * channels // LEAST_SPLIT))
    each = -(-(len(positions) + full) // streams)
    cuts = [max(0, i * each - full) // BLOCK * BLOCK for i in range(1, streams)]
    return [positions[a:b] for a, b in zip([0, *cuts], [*cuts, len(positions)])]


def _fold_pieces(
    rotated: mx.array, bias, quantized: Quantized, positions: range, piece: int, functions
) -> Sums:
    """The running sums over quantized tokens, ``piece`` of them at a time."""
    codec, origin = quantized.codec, quantized.positions.start
    sums: Any = None
    for start in positions[::piece]:
        stop = min(start + piece, positions.stop)
        mask = None
        if quantized.mask is not None:
            mask = quantized.mask[..., start - origin : stop - origin]
        elif start < quantized.oldest:
            mask = from_oldest(quantized.oldest, start, stop)
        scores = None
        if codec.bias is not None:
            scores = codec.bias.scores(bias, start, stop - start)
        keys, values = quantized.codes(start, stop)
        keys, values = codec.keys.expand(keys, -2), codec.values.expand(values, -1)
        fold = _for(stop - start, codec, functions).fold
        sums = fold(rotated, sums, keys, values, scores, mask)
    return sums


def _for(tokens: int, codec: KVCodec, functions: AttentionFunctions) -> AttentionFunctions:
    """What sums over so many tokens.

    For the highest of a single score, taken from that score, MLX's shapeless functions crash on
    CPUs (0.32.4).
    """
    return functions if tokens > 1 else attention_functions(codec.spec, compiled=False)


@functools.lru_cache(maxsize=8)
def from_oldest(oldest: int, start: int, stop: int) -> mx.array:
    """Which of the positions start, ..., stop - 1 are not before ``oldest``: (stop - start,)."""
    # By way of NumPy, since lazy arrays must not be shared by threads.
    return mx.array(np.arange(start, stop) >= oldest)

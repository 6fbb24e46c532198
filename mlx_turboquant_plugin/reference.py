"""The whole method in NumPy and fp64, written to be read: the oracle that tests compare with.

Nothing here is shared with the implementation; definitions are written down again,
and in another way where there is one. B counts sequences, H KV heads, H_q query heads,
T tokens, N queries and D channels.

The life of a key: :func:`encode_keys` takes its rotated bias away, divides it by the
balance, rotates it and quantizes it; :func:`decode_keys` goes back. Or its channels are sorted
and cut in two, and each half is rotated and quantized, with :func:`feedback` of the errors:
:func:`encode_segments`, :func:`decode_segments`. Values are only rotated and quantized.
:func:`attention` reads some tokens exactly and the others decoded.
"""

import random

import numpy as np

SEED = 2504

# The positive levels of the quantizers for N(0, 1). The best ones (Max 1960, table I),
# rounded to what a curve of whole numbers can make.
POSITIVE_LEVELS = {
    2: np.array([35.5, 118.5]) / 78.4522,
    3: np.array([13.5, 41.5, 73.5, 117.5]) / 54.6415,
    4: np.array([5.5, 16.5, 28.5, 40.5, 54.5, 70.5, 90.5, 119.5]) / 43.6528,
}
LEVELS = {bits: np.concatenate([-half[::-1], half]) for bits, half in POSITIVE_LEVELS.items()}

# The uniform quantizers of segments (the best steps of table II of the same) have the middles
# of 2^bits equal parts of the numbers from 0 to 256, less 127.5, as levels at size 1, but for a
# factor: so the sizes to be tried begin elsewhere, in steps.
UNIFORM_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041}
FACTOR = 2**-5.5
UNIFORM_LEVELS = {
    bits: FACTOR * ((np.arange(2**bits) + 0.5) * 2 ** (8 - bits) - 127.5) for bits in UNIFORM_STEPS
}
UNIFORM_SHIFTS = {
    bits: 12 * np.log2(step / (FACTOR * 2 ** (8 - bits))) for bits, step in UNIFORM_STEPS.items()
}

# The sizes a vector can be stored with, 1/12 octave apart.
SIZES = 2.0 ** (np.arange(256) / 12 - 13)

# What is tried around the root mean square, and the cost of errors along the vector.
STEPS = (0, -1, 1, -2, 2)
ALONG = 1

# Channels that are rounded at once, where errors are fed back.
FEEDBACK_BLOCK = 4

BLOCK = 32
ROLLBACK = 16


def signs(dim, seed=SEED):
    """The random signs of the rotation: (dim,), bit i of the generator's word is sign i."""
    bits = random.Random(seed * 65536 + dim).getrandbits(dim)
    return np.array([1.0 if bits >> i & 1 else -1.0 for i in range(dim)])


def walsh_hadamard(order):
    """The orthonormal Walsh-Hadamard matrix of a power of two, by Sylvester's doubling."""
    matrix: np.ndarray = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(order)


def cosines(order):
    """The orthonormal DCT-II matrix: row i is a cosine of frequency i."""
    i, j = np.mgrid[:order, :order]
    matrix = np.sqrt(2 / order) * np.cos(np.pi * (j + 0.5) * i / order)
    matrix[0] /= np.sqrt(2)
    return matrix


def rotation(dim, seed=SEED):
    """The orthogonal matrix R (dim, dim) that turns vectors x into x @ R.

    arXiv 2504.19874, section 3.1, takes any random rotation. Here: random signs, then a
    Walsh-Hadamard transform, times a DCT where dim is not a power of two.
    """
    power_of_two = dim & -dim
    spread = np.kron(walsh_hadamard(power_of_two), cosines(dim // power_of_two))
    return signs(dim, seed)[:, None] * spread


def feedback(weights):
    """How an error in some rotated channels is best made up for in those that come after: (D, D).

    With errors e of rotated channels the error of a score is sum_c w_c (e R^T)_c^2 = e C e^T on
    average. Once a block b of channels has the error u, this is least where the later channels a
    are moved by -u C_ba C_aa^-1: LDLQ (arXiv 2307.13304, section 3) in the form of GPTQ (arXiv
    2210.17323), for vectors of queries in place of inputs.

    Args:
        weights: (D,), mean squares of the queries' channels before the rotation.

    Returns:
        What an error of each channel (rows) is multiplied by, to be added to the others (columns).
    """
    dim = len(weights)
    turn = rotation(dim)
    cost = turn.T @ np.diag(weights) @ turn
    added = np.zeros((dim, dim))
    for first in range(0, dim - FEEDBACK_BLOCK, FEEDBACK_BLOCK):
        after = first + FEEDBACK_BLOCK
        added[first:after, after:] = -cost[first:after, after:] @ np.linalg.inv(
            cost[after:, after:]
        )
    return added


def quantize(x, bits, uniform=False, fed_back=None):
    """TurboQuant-MSE of rotated vectors (arXiv 2504.19874, section 3.1) with a size per vector.

    The size is the one of five near the root mean square with the least
    |e|^2 + ALONG (e . x / |x|)^2, where e is the error if each channel has the nearest level.

    Args:
        x: (..., D).
        uniform: whether levels are those of segments.
        fed_back: (D, D), see :func:`feedback`; without, each channel has the nearest level.

    Returns:
        Codes (..., D), the indices of levels, and sizes (..., 1), indices of SIZES; ints.
    """
    x = np.asarray(x, np.float64)
    if uniform:
        levels, shift = UNIFORM_LEVELS[bits], UNIFORM_SHIFTS[bits]
    else:
        levels, shift = LEVELS[bits], 0
    norm = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-20)
    start = np.round(12 * (np.log2(norm / np.sqrt(x.shape[-1])) + 13) + shift).astype(int)
    tried = []
    for step in STEPS:
        size = np.clip(start + step, 0, 255)
        codes = np.abs((x / SIZES[size])[..., None] - levels).argmin(axis=-1)
        error = x - levels[codes] * SIZES[size]
        along = np.sum(error * x / norm, axis=-1)
        tried.append((np.sum(error**2, axis=-1) + ALONG * along**2, codes, size))
    costs, codes, sizes = map(np.stack, zip(*tried))
    best = costs.argmin(axis=0)[None, ..., None]
    codes, sizes = (np.take_along_axis(choice, best, axis=0)[0] for choice in (codes, sizes))
    if fed_back is not None:
        moved = x.copy()
        for channel, added in enumerate(fed_back):
            own = moved[..., channel : channel + 1]
            code = np.abs(own / SIZES[sizes] - levels).argmin(axis=-1)
            codes[..., channel] = code
            moved = moved + (levels[code][..., None] * SIZES[sizes] - own) * added
    return codes, sizes


def dequantize(codes, sizes, bits, uniform=False):
    """The rotated vectors (..., D) of what :func:`quantize` returns."""
    return (UNIFORM_LEVELS if uniform else LEVELS)[bits][codes] * SIZES[sizes]


def rope(x, positions, base=10000.0, traditional=False, dims=None):
    """Rotary positions (arXiv 2104.09864): pair f turns by the angle t base^(-2f / dims).

    Args:
        x: (..., T, D).
        positions: (T,).
        traditional: pairs are neighbours; otherwise halves of the first ``dims`` channels.
    """
    dims = dims or x.shape[-1]
    pairs = np.arange(dims).reshape((-1, 2) if traditional else (2, -1))
    first, second = pairs.T if traditional else pairs
    angle = np.asarray(positions)[:, None] * base ** (-2 * np.arange(dims // 2) / dims)
    x1, x2 = x[..., first], x[..., second]
    turned = np.array(x, np.float64)
    turned[..., first] = x1 * np.cos(angle) - x2 * np.sin(angle)
    turned[..., second] = x1 * np.sin(angle) + x2 * np.cos(angle)
    return turned


def encode_keys(keys, bits, rotated_bias=0.0, balance=1.0):
    """Codes and sizes of keys (B, H, T, D), see :func:`quantize`.

    Args:
        rotated_bias: R_t b, the bias of ``k_proj`` under :func:`rope`, (H, T, D).
        balance: (H, 1, D).
    """
    return quantize((keys - rotated_bias) / balance @ rotation(keys.shape[-1]), bits)


def decode_keys(codes, sizes, bits, rotated_bias=0.0, balance=1.0):
    """Undo :func:`encode_keys`. Without bias and balance: of values."""
    x = dequantize(codes, sizes, bits) @ rotation(codes.shape[-1]).T
    return x * balance + rotated_bias


def encode_segments(keys, order, first_bits, rotated_bias=0.0, balance=1.0, fed_back=None):
    """Codes and sizes of both segments of keys (B, H, T, D): two pairs, see :func:`quantize`.

    Args:
        order: (H, D), which channels come first.
        first_bits: (H,), the bits of the first segment of each head; the second has the
            rest of 8.
        fed_back: (H, 2, D / 2, D / 2), see :func:`feedback`, or None.
    """
    x = np.take_along_axis((keys - rotated_bias) / balance, order[None, :, None], axis=-1)
    halves = [half @ rotation(half.shape[-1]) for half in np.split(x, 2, axis=-1)]
    pairs = []
    for segment, (half, bits) in enumerate(zip(halves, (first_bits, 8 - first_bits))):
        added = [None] * len(bits) if fed_back is None else fed_back[:, segment]
        heads = [quantize(half[:, h], bits[h], True, added[h]) for h in range(len(bits))]
        pairs.append(tuple(np.stack(x, axis=1) for x in zip(*heads)))
    return pairs


def decode_segments(segments, order, first_bits, rotated_bias=0.0, balance=1.0):
    """Undo :func:`encode_segments`."""
    halves = []
    for (codes, sizes), bits in zip(segments, (first_bits, 8 - first_bits)):
        heads = [
            dequantize(codes[:, h], sizes[:, h], bits[h], uniform=True) for h in range(len(bits))
        ]
        halves.append(np.stack(heads, axis=1) @ rotation(codes.shape[-1]).T)
    back = np.argsort(order, axis=-1)[None, :, None]
    x = np.take_along_axis(np.concatenate(halves, axis=-1), back, axis=-1)
    return x * balance + rotated_bias


def reads_exactly(queries, keys, window, sinks, invariant=False):
    """Which keys a query reads exactly: bool (N, T), for positions (N,) and (T,).

    The first ``sinks``, and those whose block of 32 is at most window / 32 blocks older. In a
    pass of more than ``ROLLBACK`` queries all read what the first does, unless ``invariant``.
    """
    if len(queries) > ROLLBACK and not invariant:
        queries = np.full_like(queries, queries[0])
    older = np.asarray(queries)[:, None] // BLOCK - np.asarray(keys) // BLOCK
    return (np.asarray(keys) < sinks) | (older <= window // BLOCK)


def attention(
    q,
    keys,
    values,
    decoded_keys,
    decoded_values,
    positions,
    window,
    sinks,
    scale,
    causal=True,
    seen=True,
    learned_sinks=None,
    invariant=False,
):
    """Attention that reads each token as :func:`reads_exactly` says.

    Args:
        q: (B, H_q, N, D), at ``positions`` (N,).
        keys, values, decoded_keys, decoded_values: (B, H, T, D), positions 0, ..., T - 1.
        seen: bool (N, T) or (T,), the tokens that have not been forgotten.
        learned_sinks: (H_q,), scores of one more token, of value zero (GPT-OSS), or None.
        invariant: see :func:`reads_exactly`.

    Returns:
        (B, H_q, N, D_v).
    """
    groups = q.shape[1] // keys.shape[1]
    keys, values, decoded_keys, decoded_values = (
        np.repeat(np.asarray(x, np.float64), groups, axis=1)
        for x in (keys, values, decoded_keys, decoded_values)
    )
    tokens = np.arange(keys.shape[2])
    exact = reads_exactly(positions, tokens, window, sinks, invariant)
    scores = scale * np.where(exact, q @ keys.swapaxes(-1, -2), q @ decoded_keys.swapaxes(-1, -2))
    if causal:
        seen = seen & (tokens <= np.asarray(positions)[:, None])
    scores = np.where(seen, scores, -np.inf)
    if learned_sinks is None:
        learned_sinks = np.full(q.shape[1], -np.inf)
    sink_scores = np.asarray(learned_sinks, np.float64)[:, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True), sink_scores)
    weights = np.exp(scores - top)
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(sink_scores - top)
    return (weights * exact) @ values + (weights * ~exact) @ decoded_values

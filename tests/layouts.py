"""Ways to cut keys into segments, for tests."""

import mlx.core as mx
import numpy as np

from mlx_turboquant_plugin.codecs.segmented import FIRST_BITS


def layout(heads: int, dim: int, seed: int = 1) -> mx.array:
    """A random order of the channels of each head, and each number of bits in turn."""
    order = np.random.default_rng(seed).permuted([np.arange(dim)] * heads, axis=1)
    bits = np.resize(FIRST_BITS, (heads, 1))
    return mx.array(np.concatenate([order, bits], axis=1).astype(np.int32))

"""What a rotated key bias adds to scores, by bias.cu alone."""

import cuda_emulator
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_turboquant_plugin.backends.cuda.bias import rotary_array
from mlx_turboquant_plugin.backends.inputs import pair_layout
from mlx_turboquant_plugin.codecs.key_bias import KeyBias

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="needs g++ 12 or clang (apt-get install g++)"
)

BODY = """
  constexpr int ROWS = 4 * NT, TOKENS = TILE / 8;
  using Bias = BiasMemory<ROWS, PAIRS, TILE>;
  __shared__ Bias memory;
  __shared__ typename Bias::Scratch turned[WARPS];
  __shared__ float query[ROWS][DIM];
  RotaryArray<PAIRS> array{table, table_shape[0]};
  RotaryPairs rotary = array.pairs(BETWEEN, DISTANCE);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x * WARPS + warp;
  memory.begin_tiles(rotary, array.waves(TILE), FIRST_QUANTIZED);
  for (int r = warp; r < ROWS; r += WARPS) {
    for (int d = lane; d < DIM; d += 32) query[r][d] = queries[r * DIM + d];
    __syncwarp();
    memory.template begin_row<DIM>(r, query[r], bias, rotary);
  }
  wait_for_copies();
  __syncthreads();
  float score[NT][TOKENS];
  memory.scores(rotary, FIRST_QUANTIZED, tile, turned[warp], score);
  for (int i = 0; i < NT * TOKENS; i++) {
    int row = 4 * (i / TOKENS) + lane % 4, token = tile * TILE + lane / 4 * TOKENS + i % TOKENS;
    scores[row * gridDim.x * WARPS * TILE + token] = score[i / TOKENS][i % TOKENS];
  }
"""


@pytest.mark.parametrize("rows_of_tiles, tile", [(1, 64), (2, 32)])
@pytest.mark.parametrize("dims, traditional", [(64, False), (64, True), (20, False), (18, True)])
def test_scores_of_hundreds_are_exact_to_thousandths(dims, traditional, rows_of_tiles, tile):
    dim, rows, tokens = 64, 4 * rows_of_tiles, 12 * tile
    random = np.random.default_rng(dims)
    queries = random.standard_normal((rows, dim)).astype(np.float32)
    bias = KeyBias(
        mx.array(20 * random.standard_normal((1, dim)).astype(np.float32)),
        nn.RoPE(dims, traditional=traditional),
    )
    numbers = {"DIM": dim, "NT": rows_of_tiles, "TILE": tile}
    numbers |= {name.upper(): x for name, x in pair_layout(bias.table)._asdict().items()}
    kernel = cuda_emulator.EmulatedKernel("split", ("queries", "bias", "table"), ("scores",), BODY)
    # Blocks of angles, which tiles of the last cross, do not fit exactly: the rope rounds them.
    for first, most in ((0, 2e-4), (128, 2e-4), (7, 4e-3), (100, 4e-3)):
        (scores,) = kernel(
            inputs=[mx.array(queries), bias.bias, rotary_array(bias.table, first + tokens)],
            grid=(3 * 128, 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(rows, tokens)],
            output_dtypes=[mx.float32],
            template=[*numbers.items(), ("FIRST_QUANTIZED", first)],
        )
        expected = queries.astype(np.float64) @ np.array(bias.rotated(first, tokens))[0].T
        assert 250 < np.abs(expected).max() < 1000
        assert np.abs(scores - expected).max() < most


def test_steps_get_the_same_array_until_the_table_grows():
    """Or MLX would trace the launches again."""
    table = KeyBias(mx.ones((2, 64)), nn.RoPE(64, base=500)).table
    array = rotary_array(table, 320)
    assert rotary_array(table, 352) is array
    longer = rotary_array(table, 5000)
    assert longer.size > array.size and rotary_array(table, 320) is longer
    kept = {id(x) for x in table.arrays}
    assert id(longer) in kept and id(array) not in kept

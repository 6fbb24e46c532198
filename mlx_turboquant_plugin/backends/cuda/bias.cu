// What a key bias adds to the scores of quantized tokens: q . R_t b, see codecs/key_bias.py. It is
//   sum over the rotary pairs f of C_f cos(angle_f t) + S_f sin(angle_f t)
// with C + i S = (q1 + i q2) (b1 - i b2), or the real part of (C + i S) exp(-i angle_f t).
//
// A warp turns C + i S to the middle of its tile, from where t counts then, and multiplies
// with the cosines and the sines of a tile, which are the same for all tiles ("waves"), in
// the matrix units. Cosines are even and sines odd: a lane sums up either for the first half
// of its tokens; their mirror images are the second half of another lane's.
//
// Scores may be hundreds, and errors of them thousandths. So each factor is the sum of two
// halves, 22 bits (Ootomo and Yokota 2022, arXiv 2203.03341).

// Two numbers as two words of halves, which add up to them.
__device__ inline void split_halves(float a, float b, unsigned& large, unsigned& small) {
  large = pack_halves(a, b);
  small = pack_halves(a - lower_half(large), b - upper_half(large));
}

// Sixteen pairs are a step of a matrix product.
__device__ constexpr int steps_of(int pairs) { return (pairs + 15) / 16; }

// What rotary_array() of bias.py has, one after the other: the waves of tiles of 32 tokens
// and of 64, and then, of `size` words in all, the angles of middles and those of blocks.
template <int PAIRS>
struct RotaryArray {
  const float* words;
  int size;

  static constexpr int WAVES = 2 * steps_of(PAIRS) * 2 * 32 * 4;

  __device__ const unsigned* waves(int tile) const {
    return reinterpret_cast<const unsigned*>(tile == SHORT_TILE ? words : words + WAVES);
  }
  __device__ RotaryPairs pairs(int between, int distance) const {
    const float* middles = words + 3 * WAVES;
    const float* blocks = middles + 2 * PAIRS * ANGLES;
    const float* sines = blocks + (words + size - blocks) / 2;
    return {middles, blocks, sines, PAIRS, between, distance};
  }
};

// What a block keeps for it. Tables: those of bias.py.
template <int ROWS, int PAIRS, int TILE>
struct BiasMemory {
  // A word holds two pairs.
  static constexpr int STEPS = steps_of(PAIRS), WORDS = 8 * STEPS;
  // So that the rows that lanes read at once are in different banks.
  static constexpr int STRIDE = (STEPS | 1) * 8;

  // Of a warp: C and S, turned; of each row the large parts and then the small ones.
  using Scratch = unsigned[2][2 * ROWS][STRIDE];

  Words waves[2][STEPS][TILE / 32][2][32];  // [cosines or sines][step][16 rows][part][lane]
  Complex start[WARPS][PAIRS];    // angles of the middles of the first tiles
  Complex pairs[ROWS][PAIRS];     // C + i S, in units of:
  float unit[ROWS], rest[ROWS];   // the largest of them; what the channels add that do not turn

  // All warps begin with this. `rotary`: that of bias.py.
  __device__ void begin_tiles(
      const RotaryPairs& rotary, const unsigned* table, int first_quantized) {
#pragma unroll 1
    for (int i = threadIdx.x; i < int(sizeof(waves) / sizeof(Words)); i += THREADS) {
      copy_words(&waves[0][0][0][0][0] + i, table + 4 * i);
    }
    int warp = threadIdx.x / 32;
    for (int f = threadIdx.x % 32; f < PAIRS; f += 32) {
      start[warp][f] = rotary.near(f, first_middle(first_quantized) % ANGLES);
    }
  }

  // The angles that scores() reads for a tile, to the cache.
  __device__ void prefetch_turns(const RotaryPairs& rotary, int first_quantized, int tile) const {
    long long at = (long long)block_of(first_quantized, tile) * PAIRS;
    if (threadIdx.x % 32 == 0) {
      prefetch(rotary.coarse_cos + at, PAIRS);
      prefetch(rotary.coarse_sin + at, PAIRS);
    }
  }

  // A warp does this for row r. query: (DIM,), in shared memory; bias: (DIM,).
  template <int DIM>
  __device__ void begin_row(
      int r, const float* query, const float* bias, const RotaryPairs& rotary) {
    int lane = threadIdx.x % 32;
    float top = 1e-30f, sum = 0;
    for (int f = lane; f < PAIRS; f += 32) {
      int first = f * rotary.between, second = first + rotary.distance;
      Complex x = product({query[first], query[second]}, {bias[first], -bias[second]});
      top = fmaxf(top, fmaxf(fabsf(x.re), fabsf(x.im)));
      pairs[r][f] = x;
    }
    for (int d = 2 * PAIRS + lane; d < DIM; d += 32) sum += query[d] * bias[d];
    top = warp_max(top);
    Complex shrink = {__fdividef(1, top), 0};
    for (int f = lane; f < PAIRS; f += 32) pairs[r][f] = product(pairs[r][f], shrink);
    if (2 * PAIRS < DIM) sum = warp_sum(sum);
    if (lane == 0) unit[r] = top, rest[r] = sum;
  }

  // The scores of this lane's tokens of a tile with its rows: those of Keys.
  template <int NT>
  __device__ void scores(
      const RotaryPairs& rotary, int first_quantized, int tile, Scratch& turned,
      float (&score)[NT][TILE / 8]) const {
    turn(rotary, first_quantized, tile, turned);
    __syncwarp();
    constexpr int TOKENS = TILE / 8;
    int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 4; i++) {
      // Columns 2 c and 2 c + 1 are the parts of row c.
      float sum[2][NT][4] = {};
#pragma unroll
      for (int part = 1; part >= 0; part--) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            Words a = waves[odd][step][i][part][lane];
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
              auto b = load_channels<2>(turned[odd][8 * nt + g] + 8 * step + 2 * c);
              multiply_add(
                  sum[odd][nt], a.x[0], a.x[1], a.x[2], a.x[3], b.channel);
            }
          }
        }
      }
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        float size = unit[4 * nt + c], constant = rest[4 * nt + c];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int t = 2 * i + j;
          float even = sum[0][nt][2 * j] + sum[0][nt][2 * j + 1];
          float odd = sum[1][nt][2 * j] + sum[1][nt][2 * j + 1];
          score[nt][t] = (even + odd) * size + constant;
          // From lane (7 - g, c).
          float mirrored = __shfl_xor_sync(ALL, even - odd, 28);
          score[nt][TOKENS - 1 - t] = mirrored * size + constant;
        }
      }
    }
    __syncwarp();
  }

 private:
  // The position of the middle of this warp's first tile, from the start of a block of angles.
  static __device__ int first_middle(int first_quantized) {
    return first_quantized % ANGLES + int(threadIdx.x) / 32 * TILE + TILE / 2;
  }

  // The block of angles in which the middle of this warp's tile is: see RotaryPairs.
  static __device__ int block_of(int first_quantized, int tile) {
    int groups = tile / WARPS;
    return first_quantized / ANGLES + first_middle(first_quantized) / ANGLES +
        groups * (WARPS * TILE / ANGLES);
  }

  __device__ void turn(
      const RotaryPairs& rotary, int first_quantized, int tile, Scratch& turned) const {
    int warp = threadIdx.x / 32, block = block_of(first_quantized, tile);
    for (int w = threadIdx.x % 32; w < WORDS; w += 32) {
      Complex back[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int f = min(2 * w + i, PAIRS - 1);
        Complex angle = product(start[warp][f], rotary.coarse(f, block));
        back[i] = {angle.re, -angle.im};
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        Complex x[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int f = 2 * w + i;
          x[i] = PAIRS % 16 == 0 || f < PAIRS ? product(pairs[r][f], back[i]) : Complex{0, 0};
        }
        split_halves(x[0].re, x[1].re, turned[0][2 * r][w], turned[0][2 * r + 1][w]);
        split_halves(x[0].im, x[1].im, turned[1][2 * r][w], turned[1][2 * r + 1][w]);
      }
    }
  }
};

// The coded tokens, TILE at a time and warp by warp.
//
// Scores: a tile of keys is the left factor of the matrix product; a lane (g, c) holds
// TILE / 8 tokens in a row, from g * TILE / 8 on, and bytes 4 c, ..., 4 c + 3 of each 16.
// The order of the channels is free, since the query follows it: no code moves between
// lanes. A lane gets the scores of its tokens with row c (of each NT).
//
// Values: a tile, transposed, is the left factor again, the weights are the right one. A
// lane (g, c) holds TILE / 4 tokens in a row and some words of each.
//
// WHOLE_TILES: the number of coded tokens is a multiple of 32, so that loads of several
// bytes are aligned and either inside or outside. PAIRS: of a rotated key bias, or 0.
template <
    int DIM, int VALUE_DIM, int KEY_BITS, int VALUE_BITS, int NT, int TILE, bool WHOLE_TILES,
    bool BALANCED, int PAIRS, typename P>
__device__ inline void attend_codes(const P& p, int part, int parts) {
  using K = Layout<DIM, KEY_BITS>;
  using V = Layout<VALUE_DIM, VALUE_BITS>;
  constexpr int ROWS = 4 * NT;
  // Keys: groups of 16 bytes, products with 32 channels each, words of a lane's tokens.
  constexpr int GROUPS = (K::ROWS + 15) / 16, STEPS = GROUPS * K::KINDS, WORDS = TILE / 32;
  constexpr int TOKENS = TILE / 8;
  // Values: a lane's tokens, and its words of each. Rows of at most four words leave half
  // of the lanes without one: those take the other half of the fields, where there are.
  constexpr int VALUE_TOKENS = TILE / 4;
  constexpr int ROW_WORDS = (V::ROWS + 3) / 4;
  constexpr bool SHARED_WORDS = ROW_WORDS <= 4 && V::KINDS > 1;
  constexpr int LANE_WORDS = (ROW_WORDS + 7) / 8;
  constexpr int LANE_KINDS = SHARED_WORDS ? V::KINDS / 2 : V::KINDS;
  constexpr int SUMS = LANE_WORDS * LANE_KINDS * 4;

  constexpr bool BIASED = PAIRS > 0;
  using Bias = BiasMemory<ROWS, BIASED ? PAIRS : 1, TILE>;
  // First the queries, then what each warp has for itself.
  union alignas(16) Memory {
    float query[ROWS][DIM];
    union {
      typename Bias::Scratch turned;
      float sum[ROWS][VALUE_DIM];
    } warp[WARPS];
  };
  __shared__ Memory memory;
  __shared__ Bias bias_memory;
  __shared__ float block_weight[WARPS][ROWS][2];
  auto& query = memory.query;

  int chunks = (p.group * p.count + ROWS - 1) / ROWS;
  int h = blockIdx.y / chunks, chunk = blockIdx.y % chunks, b = blockIdx.z;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int last_row = p.group * p.count - 1;

  // What all rows see, and what some row sees.
  int low = 0x7FFFFFFF, high = -0x7FFFFFFF, all_low = -0x7FFFFFFF, all_high = 0x7FFFFFFF;
  for (int n = 0; n < p.count; n++) {
    const int* bound = p.bounds + (b * p.count + n) * 4;
    int from = bound[1], to = p.coded - bound[2];
    low = min(low, from), all_low = max(all_low, from);
    high = max(high, to), all_high = min(all_high, to);
  }
  // Groups of tiles, one for each warp, are not cut: together they read whole lines of keys.
  int first_group = low / (TILE * WARPS);
  int groups = max(0, (high + TILE * WARPS - 1) / (TILE * WARPS) - first_group);
  int tile = (first_group + int((long long)groups * part / parts)) * WARPS + warp;
  int end_tile = min(
      (first_group + int((long long)groups * (part + 1) / parts)) * WARPS, (high + TILE - 1) / TILE);

  // Where this lane reads.
  const unsigned char *key_at[K::PLANES], *value_at[V::PLANES];
  long long head_token = (long long)(b * p.heads + h) * p.coded;
#pragma unroll
  for (int i = 0; i < K::PLANES; i++) key_at[i] = p.key_codes.plane.of[i] + head_token * K::ROWS;
  int word = SHARED_WORDS ? g % 4 : g * LANE_WORDS, half = SHARED_WORDS ? g / 4 : 0;
  // Lanes that have no word at all read the last.
  int value_byte = min(4 * word, V::ROWS % 4 ? V::ROWS - 1 : V::ROWS - 4 * LANE_WORDS);
  int value_bytes = V::ROWS - value_byte;
#pragma unroll
  for (int i = 0; i < V::PLANES; i++) {
    value_at[i] = p.value_codes.plane.of[i] + head_token * V::ROWS + value_byte;
  }
  const unsigned char* key_scale_at = p.key_codes.scale + head_token;
  const unsigned char* value_scale_at = p.value_codes.scale + head_token;

  if (tile < end_tile) {
#pragma unroll
    for (int i = 0; i < K::PLANES; i++) {
      for (int row = lane; row < K::ROWS; row += 32) {
        prefetch_line(key_at[i] + (long long)row * p.coded + tile * TILE);
      }
    }
    int bytes = min(TILE, p.coded - tile * TILE) * V::ROWS;
#pragma unroll
    for (int i = 0; i < V::PLANES; i++) {
      const unsigned char* from = p.value_codes.plane.of[i] + (head_token + tile * TILE) * V::ROWS;
      if (lane * LINE < bytes) prefetch_line(from + lane * LINE);
    }
    prefetch_line((lane % 2 ? key_scale_at : value_scale_at) + tile * TILE);
  }

  if constexpr (BIASED) bias_memory.begin_tiles(p.rotary, p.waves, p.first_coded);

  unsigned key[K::PLANES][GROUPS][4][WORDS];
  unsigned value[V::PLANES][VALUE_TOKENS][LANE_WORDS];
  unsigned key_scale[WORDS], value_scale[WORDS];

  auto load_keys = [&](int tile) {
    int token = tile * TILE + g * TOKENS;
    int at = WHOLE_TILES ? min(token, p.coded - TOKENS) : min(token, p.coded - 1);
#pragma unroll
    for (int i = 0; i < K::PLANES; i++) {
#pragma unroll
      for (int r = 0; r < GROUPS * 4; r++) {
        int row = r / 4 * 16 + 4 * c + r % 4;
        if (K::ROWS % 16) row = min(row, K::ROWS - 1);
        const unsigned char* from = key_at[i] + (unsigned(row) * unsigned(p.coded) + at);
        if constexpr (WHOLE_TILES) load_words(from, key[i][r / 4][r % 4]);
        else load_bytes(from, p.coded - at, key[i][r / 4][r % 4]);
      }
    }
    if constexpr (WHOLE_TILES) {
      load_words(key_scale_at + at, key_scale);
      load_words(value_scale_at + at, value_scale);
    } else {
      load_bytes(key_scale_at + at, p.coded - at, key_scale);
      load_bytes(value_scale_at + at, p.coded - at, value_scale);
    }
  };

  auto load_values = [&](int tile) {
    int token = tile * TILE + c * VALUE_TOKENS;
    if (WHOLE_TILES) token = min(token, p.coded - VALUE_TOKENS);
#pragma unroll
    for (int i = 0; i < V::PLANES; i++) {
      const unsigned char* from = value_at[i] + unsigned(token) * V::ROWS;
#pragma unroll
      for (int t = 0; t < VALUE_TOKENS; t++) {
        int row = WHOLE_TILES ? t : min(t, p.coded - 1 - token);
        if constexpr (V::ROWS % (4 * LANE_WORDS) == 0) {
          load_words(from + row * V::ROWS, value[i][t]);
        } else {
          load_bytes(from + row * V::ROWS, value_bytes, value[i][t]);
        }
      }
    }
  };

  // The rotated query as whole numbers.
  float unit[NT], offset[NT];
  unsigned factor[NT][STEPS][2];
  for (int r = warp; r < ROWS; r += WARPS) {
    float* x = query[r];
    read_query<DIM>(p, x, b, h, min(chunk * ROWS + r, last_row));
    if constexpr (BIASED) {
      __syncwarp();
      bias_memory.template begin_row<DIM>(r, x, p.bias + h * DIM, p.rotary);
      __syncwarp();
    }
    if constexpr (BALANCED) {
      for (int d = lane; d < DIM; d += 32) x[d] *= p.balance[h * DIM + d];
    }
    __syncwarp();
    rotate<DIM>(x, p.rotation);
    float top = 1e-30f, sum = 0;
    for (int d = lane; d < DIM; d += 32) top = fmaxf(top, fabsf(x[d]));
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, bit));
    for (int d = lane; d < DIM; d += 32) {
      x[d] = rintf(x[d] * (WHOLE / top));
      sum += x[d];
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(ALL, sum, bit);
    if (lane == 0) {
      block_weight[0][r][0] = top / (WHOLE * LEVELS<KEY_BITS>::unit);
      block_weight[0][r][1] = 0.5f * sum;
    }
  }
  if constexpr (BIASED) wait_for_copies();
  __syncthreads();
  int seen_from[NT], seen_to[NT];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    unit[nt] = block_weight[0][4 * nt + c][0];
    offset[nt] = block_weight[0][4 * nt + c][1];
    int n = min(chunk * ROWS + 4 * nt + c, last_row) % p.count;
    const int* bound = p.bounds + (b * p.count + n) * 4;
    seen_from[nt] = bound[1];
    seen_to[nt] = p.coded - bound[2];
    const float* x = query[4 * nt + g / 2];
#pragma unroll
    for (int i = 0; i < STEPS * 2; i++) {
      unsigned bytes = 0;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int step = i / 2, row = step / K::KINDS * 16 + 4 * c + i % 2 * 2 + e / 2;
        int channel = row + K::ROWS * (step % K::KINDS + K::KINDS * (e % 2));
        int whole = K::ROWS % 16 == 0 || row < K::ROWS ? int(x[channel]) : 0;
        int upper = (whole + 128) >> 8;
        bytes |= unsigned((g % 2 ? whole - 256 * upper : upper) & 0xFF) << (8 * e);
      }
      factor[nt][i / 2][i % 2] = bytes;
    }
  }
  __syncthreads();

  float top[NT], total[NT], halves[NT], sum[SUMS][NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    top[nt] = LOWEST, total[nt] = 0, halves[nt] = 0;
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i][nt][0] = sum[i][nt][1] = 0;
  }

  for (; tile < end_tile; tile += WARPS) {
    float bias[NT][TOKENS] = {};
    if constexpr (BIASED) {
      bias_memory.scores(p.rotary, p.first_coded, tile, memory.warp[warp].turned, bias);
    }
    load_keys(tile);
    int product[NT][TOKENS / 2][4] = {};
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
      for (int pair = 0; pair < TOKENS / 2; pair++) {
        // Two tokens: the lower halves of `first` and `second` are four bytes of one, the
        // upper halves those of the other.
        unsigned first[K::PLANES], second[K::PLANES];
#pragma unroll
        for (int i = 0; i < K::PLANES; i++) {
          auto& x = key[i][group];
          unsigned order = pair % 2 ? 0x7362 : 0x5140;
          first[i] = pick(x[0][pair / 2], x[1][pair / 2], order);
          second[i] = pick(x[2][pair / 2], x[3][pair / 2], order);
        }
#pragma unroll
        for (int kind = 0; kind < K::KINDS; kind++) {
          unsigned a[4][K::TABLES];
          look_up<KEY_BITS>(
              nibbles<KEY_BITS>(first, KEY_BITS == 3 ? kind / 2 : kind, KEY_BITS == 3 ? kind % 2 : 0),
              a[0], a[1]);
          look_up<KEY_BITS>(
              nibbles<KEY_BITS>(second, KEY_BITS == 3 ? kind / 2 : kind, KEY_BITS == 3 ? kind % 2 : 0),
              a[2], a[3]);
#pragma unroll
          for (int t = 0; t < K::TABLES; t++) {
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
              multiply_add(
                  product[nt][pair], a[0][t], a[1][t], a[2][t], a[3][t],
                  factor[nt][group * K::KINDS + kind]);
            }
          }
        }
      }
    }

    load_values(tile);

    // Weights, as whole numbers relative to the largest of the tile.
    float key_width[TOKENS], value_octave[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      unsigned k = key_scale[t / 4] >> (t % 4 * 8) & 0xFF;
      unsigned v = value_scale[t / 4] >> (t % 4 * 8) & 0xFF;
      key_width[t] = exp2_fast(float(k) * (1.0f / 12) - 13);
      value_octave[t] = float(v) * (1.0f / 12) - 13;
    }
    bool masked = tile * TILE < all_low || (tile + 1) * TILE > all_high;
    unsigned weight[NT][TILE / 32][2];
    float grow[NT], shrink[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      float score[TOKENS];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        auto& x = product[nt][t / 2];
        float whole = float(256 * x[t % 2 * 2] + x[t % 2 * 2 + 1]);
        score[t] = bias[nt][t] + (whole + offset[nt]) * (unit[nt] * key_width[t]);
      }
      int token = tile * TILE + g * TOKENS;
      if (masked) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          bool seen = token + t >= seen_from[nt] && token + t < seen_to[nt];
          score[t] = seen ? score[t] : NEVER;
        }
      }
      float tile_top = LOWEST;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) tile_top = fmaxf(tile_top, score[t] + value_octave[t]);
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) {
        tile_top = fmaxf(tile_top, __shfl_xor_sync(ALL, tile_top, bit));
      }
      float new_top = fmaxf(top[nt], tile_top);
      shrink[nt] = exp2_fast(top[nt] - new_top);
      grow[nt] = exp2_fast(tile_top - new_top);
      top[nt] = new_top;
      float tile_total = 0;
      unsigned whole[TOKENS], whole_sum = 0;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        tile_total += exp2_fast(score[t] - new_top);
        float x = exp2_fast(score[t] + value_octave[t] - tile_top);
        whole[t] = __float_as_uint(fmaf(x, WHOLE, TO_WHOLE));
        whole_sum += whole[t];
      }
      total[nt] = total[nt] * shrink[nt] + tile_total;
      whole_sum -= TOKENS * __float_as_uint(TO_WHOLE);
      halves[nt] = halves[nt] * shrink[nt] + float(int(whole_sum)) * grow[nt];
      // To the lanes that multiply them: weights of four tokens at a time.
      unsigned part[2][TOKENS / 4];
#pragma unroll
      for (int i = 0; i < TOKENS / 4; i++) {
        unsigned four[4] = {whole[4 * i], whole[4 * i + 1], whole[4 * i + 2], whole[4 * i + 3]};
        split_bytes(four, part[0][i], part[1][i]);
      }
#pragma unroll
      for (int i = 0; i < VALUE_TOKENS / 4; i++) {
        int token = c * VALUE_TOKENS + 4 * i;
        int source = token / TOKENS * 4 + g / 2, place = 4 * i % TOKENS / 4;
        unsigned upper = __shfl_sync(ALL, part[0][place], source);
        unsigned lower = __shfl_sync(ALL, part[1][place], source);
        weight[nt][i / 2][i % 2] = g % 2 ? lower : upper;
      }
    }

#pragma unroll
    for (int i = 0; i < LANE_WORDS; i++) {
#pragma unroll
      for (int kind = 0; kind < LANE_KINDS; kind++) {
        int product[4][NT][4] = {};
#pragma unroll
        for (int step = 0; step < TILE / 32; step++) {
          // [byte][part of the product][table]
          unsigned a[4][4][V::TABLES];
#pragma unroll
          for (int four = 0; four < 2; four++) {
            unsigned x[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
              unsigned byte[V::PLANES];
#pragma unroll
              for (int j = 0; j < V::PLANES; j++) byte[j] = value[j][step * 8 + four * 4 + t][i];
              if constexpr (VALUE_BITS == 3) {
                x[t] = nibbles<3>(byte, SHARED_WORDS ? half : kind / 2, kind % 2);
              } else {
                x[t] = nibbles<VALUE_BITS>(byte, half, kind);
              }
            }
            // Codes of two and then of four tokens side by side.
            constexpr unsigned LOW = 0x0F0F0F0Fu;
            unsigned low[2], high[2];
#pragma unroll
            for (int t = 0; t < 2; t++) {
              low[t] = merge_bits(x[2 * t], x[2 * t + 1] << 4, LOW);
              high[t] = merge_bits(x[2 * t] >> 4, x[2 * t + 1], LOW);
            }
            look_up<VALUE_BITS>(pick(low[0], low[1], 0x5140), a[0][2 * four], a[1][2 * four]);
            look_up<VALUE_BITS>(pick(low[0], low[1], 0x7362), a[2][2 * four], a[3][2 * four]);
            look_up<VALUE_BITS>(
                pick(high[0], high[1], 0x5140), a[0][2 * four + 1], a[1][2 * four + 1]);
            look_up<VALUE_BITS>(
                pick(high[0], high[1], 0x7362), a[2][2 * four + 1], a[3][2 * four + 1]);
          }
#pragma unroll
          for (int byte = 0; byte < 4; byte++) {
#pragma unroll
            for (int t = 0; t < V::TABLES; t++) {
#pragma unroll
              for (int nt = 0; nt < NT; nt++) {
                auto& x = a[byte];
                multiply_add(
                    product[byte][nt], x[0][t], x[1][t], x[2][t], x[3][t], weight[nt][step]);
              }
            }
          }
        }
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
#pragma unroll
          for (int nt = 0; nt < NT; nt++) {
            auto& x = product[byte][nt];
            auto& to = sum[(i * LANE_KINDS + kind) * 4 + byte][nt];
            to[0] = to[0] * shrink[nt] + float(256 * x[0] + x[1]) * grow[nt];
            to[1] = to[1] * shrink[nt] + float(256 * x[2] + x[3]) * grow[nt];
          }
        }
      }
    }
  }

  // The four warps together.
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      total[nt] += __shfl_xor_sync(ALL, total[nt], bit);
      halves[nt] += __shfl_xor_sync(ALL, halves[nt], bit);
    }
    int r = 4 * nt + c;
    if (g == 0) {
      block_weight[warp][r][0] = total[nt];
      block_weight[warp][r][1] = top[nt];
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      int kind = i / 4 % LANE_KINDS + half * LANE_KINDS;
      int row = 4 * (word + i / 4 / LANE_KINDS) + i % 4;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int channel = row + V::ROWS * (kind + V::KINDS * j);
        if (row < V::ROWS) memory.warp[warp].sum[r][channel] = sum[i][nt][j] + 0.5f * halves[nt];
      }
    }
  }
  __syncthreads();
  float* sums = p.template sums_of_block<ROWS, VALUE_DIM>();
  float* weights = sums + ROWS * VALUE_DIM;
  for (int i = threadIdx.x; i < ROWS * VALUE_DIM; i += THREADS) {
    int r = i / VALUE_DIM, d = i % VALUE_DIM;
    float block_top = LOWEST, x = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) block_top = fmaxf(block_top, block_weight[w][r][1]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      x += memory.warp[w].sum[r][d] * exp2f(block_weight[w][r][1] - block_top);
    }
    sums[i] = x * (1 / (WHOLE * LEVELS<VALUE_BITS>::unit));
    if (d == 0) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        all += block_weight[w][r][0] * exp2f(block_weight[w][r][1] - block_top);
      }
      weights[r * 3] = all;
      weights[r * 3 + 1] = block_top;
      weights[r * 3 + 2] = 1;
    }
  }
}

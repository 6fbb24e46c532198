// Products of a block's queries with quantized keys, a tile at a time, by a warp.
//
// A tile of keys is the left factor of the matrix product; a lane (g, c) holds TILE / 8
// tokens in a row, from g * TILE / 8 on, and bytes 4 c, ..., 4 c + 3 of each 16. The order of
// the channels is free, since the query follows it: no code moves between lanes. A lane gets
// the scores of its tokens with row c (of each NT).
//
// WHOLE_TILES: the number of quantized tokens is a multiple of 32, so that loads of several bytes
// are aligned and either inside or outside.
template <int DIM, int BITS, int SEGMENTS, int NT, int TILE, bool WHOLE_TILES>
struct Keys {
  using K = Layout<DIM, BITS>;
  // Groups of 16 bytes, and words of a lane's tokens. A product has 32 channels: of one group,
  // or of one segment and two groups.
  static constexpr int GROUPS = (K::ROWS + 15) / 16, WORDS = TILE / 32, TOKENS = TILE / 8;
  static constexpr int STEPS = SEGMENTS == 1 ? GROUPS * K::KINDS : (GROUPS + 1) / 2 * SEGMENTS;
  static constexpr int PART = DIM / SEGMENTS;
  using LevelsOfCodes = Levels<BITS, SEGMENTS>;

  // How sums of a row's whole numbers become scores: see add_scores().
  struct Scale {
    float unit, offset;
  };

  // Of row c, and four rows on of the next; in shared memory, as registers are scarce.
  const Scale (*scale)[SEGMENTS];
  unsigned factor[NT][STEPS][2];
  LevelsOfCodes levels;
  unsigned key[K::PLANES][GROUPS][4][WORDS], size[SEGMENTS][WORDS];

  // A row's whole numbers, the upper bytes and then the lower ones, as `factor` has them: words
  // of a step, of lanes c. And more, so that rows begin in different banks of memory.
  using Whole = unsigned[2][STEPS * 8 + 4];

  // A warp rotates the query x (DIM,), in shared memory, and makes it whole numbers.
  static __device__ void to_whole_numbers(
      float* x, const float* rotation, int first_bits, Scale (&scale)[SEGMENTS], Whole& to) {
#pragma unroll 1
    for (int s = 0; s < SEGMENTS; s++) {
      part_to_whole_numbers(
          x + s * PART, rotation, LevelsOfCodes::bytes(s, first_bits), scale[s]);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < STEPS * 32; i += 32) {
      int field, row = row_of(i, field), whole = row < K::ROWS ? int(x[row + K::ROWS * field]) : 0;
      reinterpret_cast<unsigned char*>(to[0])[i] = (whole + 128) >> 8;
      reinterpret_cast<unsigned char*>(to[1])[i] = whole;
    }
  }

  // Takes this lane's part of all rows.
  __device__ void begin(
      const Whole* whole, const Scale (*scales)[SEGMENTS],
      const typename LevelsOfCodes::Memory& table) {
    levels.read(table);
    int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    scale = scales + c;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      const unsigned* words = whole[4 * nt + g / 2][g % 2];
#pragma unroll
      for (int i = 0; i < STEPS * 2; i++) factor[nt][i / 2][i % 2] = words[4 * i + c];
    }
  }

  // codes: those of a head.
  static __device__ void prefetch(const Codes& codes, int quantized, int tile) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < K::PLANES; i++) {
      for (int row = lane; row < K::ROWS; row += 32) {
        prefetch_line(codes.plane.of[i] + (long long)row * quantized + tile * TILE);
      }
    }
    if (lane < SEGMENTS) prefetch_line(codes.scale + (long long)lane * quantized + tile * TILE);
  }

  __device__ void load(const Codes& codes, int quantized, int tile) {
#pragma unroll
    for (int i = 0; i < K::PLANES; i++) {
#pragma unroll
      for (int r = 0; r < GROUPS * 4; r++) {
        int row = r / 4 * 16 + 4 * (threadIdx.x % 4) + r % 4;
        if (K::ROWS % 16) row = min(row, K::ROWS - 1);
        const unsigned char* from = codes.plane.of[i] + unsigned(row) * unsigned(quantized);
        load_row(from, quantized, tile, key[i][r / 4][r % 4]);
      }
    }
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
      load_row(codes.scale + unsigned(s) * unsigned(quantized), quantized, tile, size[s]);
    }
  }

  // The bytes of this lane's tokens in a row of bytes.
  static __device__ void load_row(
      const unsigned char* row, int quantized, int tile, unsigned (&to)[WORDS]) {
    int token = tile * TILE + threadIdx.x % 32 / 4 * TOKENS;
    int at = WHOLE_TILES ? min(token, quantized - TOKENS) : min(token, quantized - 1);
    if constexpr (WHOLE_TILES) load_words(row + at, to);
    else load_bytes(row + at, quantized - at, to);
  }

  // Adds products with the tile that was loaded.
  __device__ void add_scores(float (&score)[NT][TOKENS]) const {
#pragma unroll
    for (int pair = 0; pair < TOKENS / 2; pair++) {
      int product[SEGMENTS][NT][4] = {};
      multiply(pair, product);
#pragma unroll
      for (int s = 0; s < SEGMENTS; s++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int token = 2 * pair + i;
          float width = size_of(byte_of(size[s], token));
#pragma unroll
          for (int nt = 0; nt < NT; nt++) {
            auto& x = product[s][nt];
            float whole = float(256 * x[2 * i] + x[2 * i + 1]);
            const Scale& own = scale[4 * nt][s];
            score[nt][token] += (whole + own.offset) * (own.unit * width);
          }
        }
      }
    }
  }

 private:
  static __device__ void part_to_whole_numbers(
      float* x, const float* rotation, Bytes bytes, Scale& scale) {
    int lane = threadIdx.x % 32;
    rotate<PART>(x, rotation);
    float top = 1e-30f;
    int sum = 0;
    for (int d = lane; d < PART; d += 32) top = fmaxf(top, fabsf(x[d]));
    top = warp_max(top);
    float scaled = __fdividef(WHOLE, top);
    for (int d = lane; d < PART; d += 32) {
      x[d] = rintf(x[d] * scaled);
      sum += int(x[d]);
    }
    sum = __reduce_add_sync(ALL, sum);
    if (lane == 0) scale = {top * (1 / WHOLE) * bytes.unit, bytes.offset * sum};
  }

  // Which byte of a key, and which field of it, a byte of the factor is for: see Whole.
  static __device__ int row_of(int byte, int& field) {
    int step = byte / 32, i = byte / 16 % 2, c = byte / 4 % 4, e = byte % 4;
    if constexpr (SEGMENTS == 1) {
      field = step % K::KINDS + K::KINDS * (e % 2);
      return step / K::KINDS * 16 + 4 * c + 2 * i + e / 2;
    } else {
      field = step % 2;
      return (step / 2 * 2 + i) * 16 + 4 * c + e;
    }
  }

  // Two tokens of a group: the lower halves of `first` and `second` are four bytes of one, the
  // upper halves those of the other.
  __device__ void pick_pair(
      int plane, int group, int pair, unsigned& first, unsigned& second) const {
    auto& x = key[plane][group];
    unsigned order = pair % 2 ? 0x7362 : 0x5140;
    first = pick(x[0][pair / 2], x[1][pair / 2], order);
    second = pick(x[2][pair / 2], x[3][pair / 2], order);
  }

  __device__ void multiply(int pair, int (&product)[1][NT][4]) const {
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      unsigned first[K::PLANES], second[K::PLANES];
#pragma unroll
      for (int i = 0; i < K::PLANES; i++) pick_pair(i, group, pair, first[i], second[i]);
#pragma unroll
      for (int kind = 0; kind < K::KINDS; kind++) {
        int half = BITS == 3 ? kind / 2 : kind, odd = BITS == 3 ? kind % 2 : 0;
        unsigned a[4][K::TABLES];
        look_up<BITS>(levels, nibbles<BITS>(first, half, odd), a[0], a[1]);
        look_up<BITS>(levels, nibbles<BITS>(second, half, odd), a[2], a[3]);
#pragma unroll
        for (int t = 0; t < K::TABLES; t++) {
#pragma unroll
          for (int nt = 0; nt < NT; nt++) {
            multiply_add(
                product[0][nt], a[0][t], a[1][t], a[2][t], a[3][t],
                factor[nt][group * K::KINDS + kind]);
          }
        }
      }
    }
  }

  __device__ void multiply(int pair, int (&product)[2][NT][4]) const {
#pragma unroll
    for (int step = 0; step < STEPS / 2; step++) {
      // [2 group + token]; what is missing of the last step is multiplied by 0.
      unsigned a[4], b[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        unsigned first, second;
        pick_pair(0, min(2 * step + i, GROUPS - 1), pair, first, second);
        unsigned token[2] = {pick(first, second, 0x5410), pick(first, second, 0x7632)};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          a[2 * i + j] = levels.first(token[j]);
          b[2 * i + j] = levels.second(token[j]);
        }
      }
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        multiply_add(product[0][nt], a[0], a[1], a[2], a[3], factor[nt][2 * step]);
        multiply_add(product[1][nt], b[0], b[1], b[2], b[3], factor[nt][2 * step + 1]);
      }
    }
  }
};

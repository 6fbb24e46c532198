// Sums of quantized values, weighed by whole numbers, a tile at a time, by a warp.
//
// A tile, transposed, is the left factor of the matrix product, the weights are the right one.
// A lane (g, c) holds TILE / 4 tokens in a row and some words of each.
template <int DIM, int BITS, int NT, int TILE, bool WHOLE_TILES>
struct Values {
  using V = Layout<DIM, BITS>;
  using LevelsOfCodes = Levels<BITS>;
  // A lane's tokens, and its words of each. Rows of at most four words leave half of the lanes
  // without one: those take the other half of the fields, where there are.
  static constexpr int TOKENS = TILE / 4;
  static constexpr int ROW_WORDS = (V::ROWS + 3) / 4;
  static constexpr bool SHARED_WORDS = ROW_WORDS <= 4 && V::KINDS > 1;
  static constexpr int WORDS = (ROW_WORDS + 7) / 8;
  static constexpr int KINDS = SHARED_WORDS ? V::KINDS / 2 : V::KINDS;
  static constexpr int SUMS = WORDS * KINDS * 4;

  LevelsOfCodes levels;
  float sum[SUMS][NT][2];
  unsigned value[V::PLANES][TOKENS][WORDS];

  __device__ void begin(const typename LevelsOfCodes::Memory& table) {
    levels.read(table);
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++) sum[i][nt][0] = sum[i][nt][1] = 0;
    }
  }

  // codes, planes: those of a head.
  static __device__ void prefetch(const Codes& codes, int quantized, int tile) {
    int lane = threadIdx.x % 32, bytes = min(TILE, quantized - tile * TILE) * V::ROWS;
#pragma unroll
    for (int i = 0; i < V::PLANES; i++) {
      if (lane * LINE < bytes) {
        prefetch_line(codes.plane.of[i] + (long long)tile * TILE * V::ROWS + lane * LINE);
      }
    }
    if (lane == 0) prefetch_line(codes.scale + tile * TILE);
  }

  __device__ void load(const Planes& planes, int quantized, int tile) {
    int token = tile * TILE + threadIdx.x % 4 * TOKENS;
    if (WHOLE_TILES) token = min(token, quantized - TOKENS);
    // Lanes that have no word at all read the last.
    int byte = min(4 * word(), V::ROWS % 4 ? V::ROWS - 1 : V::ROWS - 4 * WORDS);
#pragma unroll
    for (int i = 0; i < V::PLANES; i++) {
      const unsigned char* from = planes.of[i] + byte + unsigned(token) * V::ROWS;
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        int row = WHOLE_TILES ? t : min(t, quantized - 1 - token);
        if constexpr (V::ROWS % (4 * WORDS) == 0) {
          load_words(from + row * V::ROWS, value[i][t]);
        } else {
          load_bytes(from + row * V::ROWS, V::ROWS - byte, value[i][t]);
        }
      }
    }
  }

  // sum = sum shrink + (the tile that was loaded, weighed) grow.
  __device__ void add(
      const unsigned (&weight)[NT][TILE / 32][2], const float (&shrink)[NT],
      const float (&grow)[NT]) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++) {
        int product[4][NT][4] = {};
#pragma unroll
        for (int step = 0; step < TILE / 32; step++) multiply(i, kind, step, weight, product);
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
#pragma unroll
          for (int nt = 0; nt < NT; nt++) {
            auto& x = product[byte][nt];
            auto& to = sum[(i * KINDS + kind) * 4 + byte][nt];
            to[0] = to[0] * shrink[nt] + float(256 * x[0] + x[1]) * grow[nt];
            to[1] = to[1] * shrink[nt] + float(256 * x[2] + x[3]) * grow[nt];
          }
        }
      }
    }
  }

  // The sums of this lane, each more by that of half the weights: a level is a byte and a half.
  __device__ void store(const float (&halves)[NT], float (*to)[DIM]) const {
    int c = threadIdx.x % 4;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) {
        int kind = i / 4 % KINDS + half() * KINDS, row = 4 * (word() + i / 4 / KINDS) + i % 4;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int channel = row + V::ROWS * (kind + V::KINDS * j);
          if (row < V::ROWS) to[4 * nt + c][channel] = sum[i][nt][j] + 0.5f * halves[nt];
        }
      }
    }
  }

 private:
  // This lane's first word of a token, and half of its fields.
  static __device__ int word() {
    int g = threadIdx.x % 32 / 4;
    return SHARED_WORDS ? g % 4 : g * WORDS;
  }
  static __device__ int half() { return SHARED_WORDS ? threadIdx.x % 32 / 16 : 0; }

  // [byte]: word i of 32 tokens, and nibbles of one kind.
  __device__ void multiply(
      int i, int kind, int step, const unsigned (&weight)[NT][TILE / 32][2],
      int (&product)[4][NT][4]) const {
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
        if constexpr (BITS == 3) {
          x[t] = nibbles<3>(byte, SHARED_WORDS ? half() : kind / 2, kind % 2);
        } else {
          x[t] = nibbles<BITS>(byte, half(), kind);
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
      auto look_up_two = [&](int part, const unsigned(&four_codes)[2]) {
        look_up<BITS>(levels, pick(four_codes[0], four_codes[1], 0x5140), a[0][part], a[1][part]);
        look_up<BITS>(levels, pick(four_codes[0], four_codes[1], 0x7362), a[2][part], a[3][part]);
      };
      look_up_two(2 * four, low);
      look_up_two(2 * four + 1, high);
    }
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
#pragma unroll
      for (int t = 0; t < V::TABLES; t++) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          auto& x = a[byte];
          multiply_add(product[byte][nt], x[0][t], x[1][t], x[2][t], x[3][t], weight[nt][step]);
        }
      }
    }
  }
};

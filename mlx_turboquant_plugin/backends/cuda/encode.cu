// Codes of vectors, as codecs/kv_codec.py makes them: the key bias taken away, divided by the
// balance, sorted, rotated, quantized and packed. A block for some tokens of one head, a warp for
// each: its lane l has the rotated channels l, l + 32, ... of a segment. Loops are left as
// they are where the machine code would be long: see problem.cu.

// A quantizer: by how many steps the search for a scale begins above the root mean square, the
// unit of levels, and the code of the level nearest to x, in that unit, with the level.
template <int BITS>
struct LloydMax {
  using L = LEVELS<BITS>;
  static constexpr float shift = 0, unit = L::unit;

  __device__ int nearest(float x, float& level) const {
    constexpr int HALF = 1 << (BITS - 1);
    float size = fabsf(x), found = L::positive(0);
    int magnitude = 0;
#pragma unroll
    for (int i = 1; i < HALF; i++) {
      bool above = size > 0.5f * (L::positive(i - 1) + L::positive(i));
      found = above ? L::positive(i) : found;
      magnitude += above;
    }
    level = x < 0 ? -found : found;
    return x < 0 ? HALF - 1 - magnitude : HALF + magnitude;
  }
};

// That of a segment: levels are the middles of equal parts of the bytes.
struct Uniform {
  static constexpr float unit = SEGMENTED::unit;
  float shift, count, part;

  __device__ explicit Uniform(int bits)
      : shift(SEGMENTED::shift(bits)), count(1 << bits), part(256 >> bits) {}

  __device__ int nearest(float x, float& level) const {
    float code = floorf((x + OFFSET) * (count / 256));
    code = fminf(fmaxf(code, 0), count - 1);
    level = (code + 0.5f) * part - OFFSET;
    return int(code);
  }
};

// The nearest codes of `own`, channels of a rotated vector, one in each byte.
template <int DIM, typename Quantizer, int N>
__device__ inline void round_channels(
    const float (&own)[N], float size, const Quantizer& quantizer, unsigned char* codes) {
  int lane = threadIdx.x % 32;
  float inverse = __fdividef(1, size);
#pragma unroll
  for (int i = 0; i < N; i++) {
    float level;
    int code = quantizer.nearest(own[i] * inverse, level);
    if (lane + 32 * i < DIM) codes[lane + 32 * i] = code;
  }
}

// The same, some channels after the other: what a block loses, times their rows of `feedback`,
// (DIM, DIM), is added to those that come after them; the others' columns are zero.
template <int DIM, typename Quantizer, int N, typename F>
__device__ inline void round_with_feedback(
    float (&own)[N], float size, const Quantizer& quantizer, const F* feedback,
    unsigned char* codes) {
  constexpr int BLOCK = FEEDBACK_BLOCK;
  int lane = threadIdx.x % 32;
  float inverse = __fdividef(1, size);
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll 1
    for (int first = 0; first < 32 && 32 * i + first < DIM; first += BLOCK) {
      float level;
      int code = quantizer.nearest(own[i] * inverse, level);
      float lost = level * size - own[i];
      if (lane / BLOCK == first / BLOCK) codes[lane + 32 * i] = code;
#pragma unroll
      for (int k = 0; k < BLOCK; k++) {
        float one = __shfl_sync(ALL, lost, first + k);
        const F* row = feedback + (32 * i + first + k) * DIM;
#pragma unroll
        for (int j = i; j < N; j++) {
          if (lane + 32 * j < DIM) own[j] += one * float(row[lane + 32 * j]);
        }
      }
    }
  }
}

// The codes of a rotated vector, one in each byte; returns its scale. `feedback`: see above, or
// null.
template <int DIM, typename Quantizer, typename F>
__device__ inline int encode_vector(
    const float* x, const Quantizer& quantizer, const F* feedback, unsigned char* codes) {
  constexpr int N = (DIM + 31) / 32;
  int lane = threadIdx.x % 32;
  float own[N], squares = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    own[i] = lane + 32 * i < DIM ? x[lane + 32 * i] : 0;
    squares += own[i] * own[i];
  }
  squares = fmaxf(warp_sum(squares), 1e-37f);
  float near = (0.5f * __log2f(squares / DIM) - LOWEST_OCTAVE) * STEPS_PER_OCTAVE;
  near += quantizer.shift;
  int start = int(rintf(fminf(fmaxf(near, -2), 257))), best_scale = 0;
  float best = 0, norm = rsqrtf(squares);
#pragma unroll 1
  for (int i = 0; i < SEARCHED; i++) {
    // 0, -1, 1, -2, 2
    int scale = min(max(start + (i % 2 ? -(i + 1) / 2 : i / 2), 0), 255);
    float size = size_of(scale) * (1 / quantizer.unit), inverse = __fdividef(1, size);
    float error = 0, along = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float level;
      quantizer.nearest(own[j] * inverse, level);
      float missing = lane + 32 * j < DIM ? own[j] - level * size : 0;
      error += missing * missing;
      along += missing * own[j];
    }
    along = warp_sum(along) * norm;
    error = warp_sum(error) + ALONG * along * along;
    if (i == 0 || error < best) best = error, best_scale = scale;
  }
  float size = size_of(best_scale) * (1 / quantizer.unit);
  if (feedback) {
    round_with_feedback<DIM>(own, size, quantizer, feedback, codes);
  } else {
    round_channels<DIM>(own, size, quantizer, codes);
  }
  return best_scale;
}

template <int DIM, typename Quantizer, typename F>
__device__ inline void rotate_and_encode(
    float* x, const float* rotation, const Quantizer& quantizer, const F* feedback,
    unsigned char* codes, unsigned char* scale) {
  rotate<DIM>(x, rotation);
  int found = encode_vector<DIM>(x, quantizer, feedback, codes);
  if (threadIdx.x % 32 == 0) *scale = found;
}

// `rows` rows of this head that have become longer: from (B, H, rows, before) to
// (B, H, rows, after), in bytes. UNIT: bytes at a time, which both are a multiple of.
template <int UNIT>
__device__ inline void copy_rows(
    const unsigned char* from, unsigned char* to, int rows, long long before, long long after,
    unsigned worker, unsigned workers) {
  long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y;
  unsigned units = before / UNIT;
  from += head * rows * before, to += head * rows * after;
#pragma unroll 1
  for (unsigned i = worker; i < rows * units; i += workers) {
    long long at = i / units * after + i % units * UNIT;
    if constexpr (UNIT == 16) {
      Words words;
      load_words(from + (long long)i * UNIT, words.x);
      *reinterpret_cast<Words*>(to + at) = words;
    } else {
      to[at] = from[i];
    }
  }
}

// Codes of this head that were there `before`, to where all are, `after`; both in tokens.
template <
    int TOKENS, int DIM, int BITS, int SEGMENTS, bool CHANNEL_MAJOR, int UNIT, int PLANES>
__device__ inline void copy_codes(
    const unsigned char* const (&older)[PLANES], const unsigned char* older_scales,
    unsigned char* const (&planes)[PLANES], unsigned char* scales, long long before,
    long long after, int block, int blocks) {
  constexpr int BYTES = Layout<DIM, BITS>::ROWS;
  constexpr int ROWS = CHANNEL_MAJOR ? BYTES : 1, WIDTH = CHANNEL_MAJOR ? 1 : BYTES;
  int worker = block * 32 * TOKENS + threadIdx.x, workers = blocks * 32 * TOKENS;
#pragma unroll 1
  for (int i = 0; i < PLANES; i++) {
    copy_rows<UNIT>(older[i], planes[i], ROWS, before * WIDTH, after * WIDTH, worker, workers);
  }
  copy_rows<UNIT>(older_scales, scales, SEGMENTS, before, after, worker, workers);
}

// What is known of keys; see encode_vectors().
struct Known {
  const float* balance;
  const int* layout;
  const float* bias;
  const RotaryPairs& rotary;
};

// A token's vector x (DIM,), by a warp: without its bias, balanced and sorted.
template <int DIM, bool BALANCED, bool SORTED, bool BIASED, typename X>
__device__ inline void read_vector(
    const X* x, const Known& known, int h, int position, float* to) {
  for (int d = threadIdx.x % 32; d < DIM; d += 32) {
    int channel = d;
    if constexpr (SORTED) channel = known.layout[h * (DIM + 1) + d];
    float y = float(x[channel]);
    if constexpr (BIASED) y -= rotated_bias(known.bias + h * DIM, known.rotary, channel, position);
    if constexpr (BALANCED) y = __fdividef(y, known.balance[h * DIM + channel]);
    to[d] = y;
  }
  __syncwarp();
}

// Codes in memory, `count` of them from token number `first` of `total` on: packed, so that
// neighbouring threads write neighbouring bytes. codes: a byte each, rows DIM + 4 apart.
template <int TOKENS, int DIM, int BITS, int SEGMENTS, bool CHANNEL_MAJOR, int PLANES>
__device__ inline void pack_codes(
    const unsigned char* codes, int count, long long head, int first, long long total,
    int first_bits, unsigned char* const (&planes)[PLANES]) {
  constexpr int FIELDS = Layout<DIM, BITS>::FIELDS, BYTES = Layout<DIM, BITS>::ROWS;
#pragma unroll 1
  for (int i = threadIdx.x; i < TOKENS * BYTES; i += 32 * TOKENS) {
    int slot = CHANNEL_MAJOR ? i % TOKENS : i / BYTES;
    int byte = CHANNEL_MAJOR ? i / TOKENS : i % BYTES;
    if (slot >= count) continue;
    unsigned packed = 0, high = 0;
#pragma unroll
    for (int field = 0; field < FIELDS; field++) {
      unsigned code = codes[slot * (DIM + 4) + field * BYTES + byte];
      if constexpr (SEGMENTS == 2) {
        packed |= field == 0 ? code << (8 - first_bits) : code;
      } else if constexpr (BITS == 3) {
        packed |= (code & 3) << (2 * field);
        high |= (code >> 2) << field;
      } else {
        packed |= code << (BITS * field);
      }
    }
    long long at = CHANNEL_MAJOR ? (head * BYTES + byte) * total + first + slot
                                 : (head * total + first + slot) * BYTES + byte;
    planes[0][at] = packed;
    if constexpr (BITS == 3) {
      planes[1][at] = packed >> 8;
      planes[2][at] = high;
    }
  }
}

// x: the first of `length` tokens of this head, (length, DIM), which there are the codes of
// `before` others before. `start`: the position of the first. rotation: see rotate().
// known: balance (H, 1, DIM), layout (H, DIM + 1), bias (H, DIM), each as far as there are any.
// feedback: (H, SEGMENTS, PART, PART), or null. planes:
// (B, H, bytes, T) if CHANNEL_MAJOR, (B, H, T, bytes) otherwise. scales: (B, H, SEGMENTS, T).
// `vectors` and `codes`: shared memory of TOKENS times DIM and DIM + 4: so the same byte of all
// tokens is in 32 banks.
template <
    int TOKENS, int DIM, int BITS, int SEGMENTS, bool CHANNEL_MAJOR, bool BALANCED, bool SORTED,
    bool BIASED, typename X, typename F, int PLANES>
__device__ inline void encode_vectors(
    const X* x, int length, int before, int start, const float* rotation, const Known& known,
    const F* feedback, unsigned char* const (&planes)[PLANES], unsigned char* scales,
    float* vectors, unsigned char* codes, int block) {
  constexpr int PART = DIM / SEGMENTS;
  int warp = this_warp(), h = blockIdx.y, first = block * TOKENS, token = first + warp;
  int first_bits = first_bits_of<DIM, SORTED>(known.layout, h);
  long long head = (long long)blockIdx.z * gridDim.y + h, total = before + length;
  if (token < length) {
    float* vector = vectors + warp * DIM;
    read_vector<DIM, BALANCED, SORTED, BIASED>(
        x + (long long)token * DIM, known, h, start + token, vector);
    unsigned char* own = codes + warp * (DIM + 4);
    unsigned char* scale = scales + head * SEGMENTS * total + before + token;
    if constexpr (SEGMENTS == 1) {
      rotate_and_encode<DIM>(vector, rotation, LloydMax<BITS>(), (const F*)nullptr, own, scale);
    } else {
#pragma unroll 1
      for (int s = 0; s < SEGMENTS; s++) {
        Uniform quantizer(s == 0 ? first_bits : 8 - first_bits);
        const F* added = feedback ? feedback + (h * SEGMENTS + s) * PART * PART : nullptr;
        rotate_and_encode<PART>(
            vector + s * PART, rotation, quantizer, added, own + s * PART, scale + s * total);
      }
    }
  }
  __syncthreads();
  pack_codes<TOKENS, DIM, BITS, SEGMENTS, CHANNEL_MAJOR>(
      codes, length - first, head, before + first, total, first_bits, planes);
}

// Keys or values of one layer side by side, as MLX's own attention takes them: the sinks,
// tokens from their codes, then full-precision ones, with zeros before and after; and the
// full-precision tokens that a cache keeps. Codes become levels, are rotated back, multiplied by
// the balance, and get the key bias, in places that the layout of sorted channels tells.
//
// A threadgroup serves TOKENS tokens of one (sequence, KV head): the first ones tiles of codes,
// aligned to multiples of TOKENS, the others all other tokens. A simdgroup takes a token, a lane
// the channels lane, lane + 32, ...

// What is read and written, in tokens.
struct Places {
  // T; zeros before; sinks.
  int total, left, sinks;
  // Codes: the first that counts, how many do, how many there are, the position of the first.
  int first, decoded, quantized, start;
  // Full-precision tokens: how many are older ones; of all, the first that counts and how many
  // do, and the first that is kept and how many are. Sinks always do and are.
  int older_count, full_first, full, kept_first, kept;
  // H, and how many full-precision tokens are newer ones.
  int heads, newer_count;
  // The rotary pairs; see rotated_bias().
  int pairs, between, distance;

  explicit Places(device const int* from)
      : total(from[0]), left(from[1]), sinks(from[2]), first(from[3]), decoded(from[4]),
        quantized(from[5]), start(from[6]), older_count(from[7]), full_first(from[8]),
        full(from[9]), kept_first(from[10]), kept(from[11]), heads(from[12]),
        newer_count(from[13]), pairs(from[14]), between(from[15]), distance(from[16]) {}

  int tiles() const {
    return decoded == 0 ? 0 : (first + decoded - 1) / TOKENS - first / TOKENS + 1;
  }
  int groups() const { return tiles() + (total - decoded + TOKENS - 1) / TOKENS; }
  int kept_groups() const { return (sinks + kept + TOKENS - 1) / TOKENS; }
};

// The arrays of one side, at their first elements.
template <typename T, typename Scale>
struct Arrays {
  device const T* older;  // (B, H, older_count, D)
  device const T* newer;  // (B, N, H, D)
  Planes planes;          // see StoredVector
  device const Scale* scales;
  device const Scale* zeros;
  device const float* rotation;
  device const float* levels;
  device const float* balance;
  device const float* bias;
  device const float* fine;
  device const float* coarse_cos;
  device const float* coarse_sin;
  device const int* layout;
  device T* out;   // (B, H, total, D)
  device T* kept;  // (B, H, sinks + kept, D)
};

// Brings the codes of `count` tokens from `begin` on to threadgroup memory.
template <typename Stored, bool CHANNEL_MAJOR>
METAL_FUNC void load_tile(
    Planes planes, threadgroup uint8_t* tile, size_t head, int begin, int count, int quantized,
    int thread_index) {
  UNROLL
  for (int p = 0; p < Stored::PLANES; p++) {
    device const uint8_t* plane =
        p == 0 ? planes.low : p == 1 ? planes.low_of_upper_fields : planes.high;
    if (CHANNEL_MAJOR) {
      constexpr int WORDS = TOKENS / 4;
      ROLLED
      for (int i = thread_index; i < Stored::BYTES * WORDS; i += THREADS) {
        const int row = i / WORDS, token = i % WORDS * 4;
        const size_t at = (head * Stored::BYTES + row) * quantized + begin + token;
        const uint four = load_four(plane + at, count - token, quantized % 4 == 0);
        UNROLL
        for (int k = 0; k < 4; k++) {
          tile[(token + k) * Stored::PITCH + p * Stored::BYTES + row] = (four >> (8 * k)) & 255;
        }
      }
    } else {
      const size_t at = (head * quantized + begin) * Stored::BYTES;
      for (int i = thread_index; i < count * Stored::BYTES; i += THREADS) {
        const int token = i / Stored::BYTES;
        tile[token * Stored::PITCH + p * Stored::BYTES + i % Stored::BYTES] = plane[at + i];
      }
    }
  }
}

// Rotates back a simdgroup's vector, or a segment of it. `rotation`: signs, or the transposed
// matrix. `scratch`: D numbers of the simdgroup's own, for matrices.
template <int D, int COUNT>
METAL_FUNC void rotate_back(
    thread float (&y)[COUNT], device const float* rotation, threadgroup float* scratch,
    int lane) {
  if ((D & (D - 1)) == 0) {
    walsh_hadamard<D>(y, lane);
    multiply_signs<D>(y, rotation, lane);
  } else {
    multiply_matrix<D>(y, rotation, scratch, lane);
  }
}

// Segment s of the quantized token in place `index`, whose bytes are `codes`, to where it belongs.
template <
    typename Stored, bool AFFINE, bool BALANCED, bool SORTED, bool BIASED, typename T,
    typename Scale>
METAL_FUNC void decode_segment(
    thread const Arrays<T, Scale>& arrays, thread const Places& places,
    threadgroup const uint8_t* codes, threadgroup const float* known_levels,
    threadgroup float* scratch, int index, int kv_index, int s, device T* to, int lane) {
  constexpr int SEGMENT = Stored::SEGMENT, COUNT = (SEGMENT + 31) / 32;
  const int kv_head = kv_index % places.heads;
  const int first = kv_head * Stored::DIM;
  device const int* order = arrays.layout + kv_head * (Stored::DIM + 1);
  const SegmentLevels segment_levels(
      first_bits_of<Stored::DIM, Stored::SEGMENTS, SORTED>(arrays.layout, kv_head));
  float y[COUNT];
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    const int i = 32 * j + lane;
    y[j] = 0;
    if (i < SEGMENT) {
      const size_t vector = size_t(kv_index) * places.quantized + index;
      if (AFFINE) {
        const size_t at = vector * Stored::SCALES + i / Stored::GROUP;
        y[j] = float(Stored::code(codes, i)) * float(arrays.scales[at]) + float(arrays.zeros[at]);
      } else {
        // Those of several segments are channel-major.
        const size_t at = (size_t(kv_index) * Stored::SEGMENTS + s) * places.quantized + index;
        y[j] = size_of(uint(arrays.scales[at]));
        y[j] *= Stored::SEGMENTS == 1
            ? level<false>(known_levels, Stored::code(codes, i))
            : segment_level(segment_levels.four(codes[i], s), 0) * known_levels[WIDTH];
      }
    }
  }
  rotate_back<SEGMENT>(y, arrays.rotation, scratch, lane);
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    const int i = 32 * j + lane;
    if (i < SEGMENT) {
      const int place = s * SEGMENT + i;
      const int c = SORTED ? order[place] : place;
      if (BALANCED) {
        y[j] *= arrays.balance[first + c];
      }
      if (BIASED) {
        y[j] += rotated_bias(
            arrays.bias + first, arrays.coarse_cos, arrays.coarse_sin, arrays.fine, places.pairs,
            places.between, places.distance, c, places.start + index);
      }
      to[c] = static_cast<T>(y[j]);
    }
  }
}

// The tokens of one tile of codes.
template <
    typename Stored, bool AFFINE, bool CHANNEL_MAJOR, bool BALANCED, bool SORTED, bool BIASED,
    typename T, typename Scale>
METAL_FUNC void decode_tile(
    thread const Arrays<T, Scale>& arrays, thread const Places& places,
    threadgroup uint8_t* tile, threadgroup float* known_levels, threadgroup float* all_scratch,
    int group, int kv_index, int thread_index, int simd) {
  const int lane = thread_index % 32;
  const int begin = (places.first / TOKENS + group) * TOKENS;
  const int count = min(TOKENS, places.quantized - begin);
  load_tile<Stored, CHANNEL_MAJOR>(
      arrays.planes, tile, kv_index, begin, count, places.quantized, thread_index);
  if (thread_index < MOST_LEVELS) {
    known_levels[thread_index] = arrays.levels[thread_index];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int token = simd; token < count; token += SIMDS) {
    const int index = begin + token;
    if (index < places.first || index >= places.first + places.decoded) {
      continue;
    }
    const size_t place = places.left + places.sinks + index - places.first;
    device T* to = arrays.out + (size_t(kv_index) * places.total + place) * Stored::DIM;
    ROLLED
    for (int s = 0; s < Stored::SEGMENTS; s++) {
      decode_segment<Stored, AFFINE, BALANCED, SORTED, BIASED>(
          arrays, places, tile + token * Stored::PITCH, known_levels,
          all_scratch + simd * Stored::SEGMENT, index, kv_index, s, to, lane);
    }
  }
}

// The full-precision token in place `slot` of the older and newer ones, (D,).
template <int D, typename T, typename Scale>
METAL_FUNC device const T* full_token(
    thread const Arrays<T, Scale>& arrays, thread const Places& places, int slot, int kv_index) {
  if (slot < places.older_count) {
    return arrays.older + (size_t(kv_index) * places.older_count + slot) * D;
  }
  const int sequence = kv_index / places.heads, kv_head = kv_index % places.heads;
  const size_t token = size_t(sequence) * places.newer_count + slot - places.older_count;
  return arrays.newer + (token * places.heads + kv_head) * D;
}

// One side's share of group number `group`, of those that it has.
template <
    typename Stored, bool AFFINE, bool CHANNEL_MAJOR, bool BALANCED, bool SORTED, bool BIASED,
    typename T, typename Scale>
METAL_FUNC void lay_out(
    thread const Arrays<T, Scale>& arrays, thread const Places& places,
    threadgroup uint8_t* tile, threadgroup float* known_levels, threadgroup float* all_scratch,
    int group, int kv_index, int thread_index, int simd) {
  constexpr int D = Stored::DIM;
  if (group < places.tiles()) {
    decode_tile<Stored, AFFINE, CHANNEL_MAJOR, BALANCED, SORTED, BIASED>(
        arrays, places, tile, known_levels, all_scratch, group, kv_index, thread_index, simd);
    return;
  }
  const bool keeps = group >= places.groups();
  const int begin = (group - (keeps ? places.groups() : places.tiles())) * TOKENS;
  const int left = keeps ? 0 : places.left, first = keeps ? places.kept_first : places.full_first;
  const int full = keeps ? places.kept : places.full, decoded = keeps ? 0 : places.decoded;
  const int total = keeps ? places.sinks + places.kept : places.total;
  device T* to = keeps ? arrays.kept : arrays.out;
  const int count = min(TOKENS, total - decoded - begin);
  ROLLED
  for (int i = simd; i < count; i += SIMDS) {
    const int token = begin + i;
    const int place = token < left + places.sinks ? token : token + decoded;
    int slot = token - left;
    if (slot >= places.sinks) {
      slot = slot - places.sinks < full ? slot - places.sinks + first : -1;
    }
    device const T* from = full_token<D>(arrays, places, max(slot, 0), kv_index);
    device T* at = to + (size_t(kv_index) * total + place) * D;
    UNROLL
    for (int c = thread_index % 32; c < D; c += 32) {
      at[c] = slot < 0 ? static_cast<T>(0.0f) : from[c];
    }
  }
}

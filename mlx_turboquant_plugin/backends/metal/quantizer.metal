// What encode.metal does to a vector, or to a segment of one: rotation, size and codes.
//
// A simdgroup takes one; channel 32 * j + lane is y[j], and those beyond the last are zero.

// What is known of a KV head's keys, each as far as it is there; see rotated_bias().
struct Known {
  device const float* balance;
  device const float* bias;
  device const float* fine;
  device const float* coarse_cos;
  device const float* coarse_sin;
  device const int* order;
  int pairs, between, distance;
};

// The D channels of a vector x from place `first` on: without their bias, balanced and sorted.
template <int D, bool BALANCED, bool SORTED, bool BIASED, int COUNT, typename T>
METAL_FUNC void read_segment(
    device const T* x, thread const Known& known, int first, int position, int lane,
    thread float (&y)[COUNT]) {
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    y[j] = 0;
    if (32 * j + lane < D) {
      const int place = first + 32 * j + lane;
      const int c = SORTED ? known.order[place] : place;
      y[j] = float(x[c]);
      if (BIASED) {
        y[j] -= rotated_bias(
            known.bias, known.coarse_cos, known.coarse_sin, known.fine, known.pairs,
            known.between, known.distance, c, position);
      }
      if (BALANCED) {
        y[j] /= known.balance[c];
      }
    }
  }
}

template <int D, int COUNT>
METAL_FUNC void rotate_vector(
    thread float (&y)[COUNT], device const float* rotation, threadgroup float* scratch, int lane) {
  if ((D & (D - 1)) == 0) {
    multiply_signs<D>(y, rotation, lane);
    walsh_hadamard<D>(y, lane);
  } else {
    multiply_matrix<D>(y, rotation, scratch, lane);
  }
}

// The quantizer of BITS bits whose levels are given, both negative and positive ones.
template <int BITS>
struct LloydMax {
  static constant constexpr const int HALF = 1 << (BITS - 1);
  // The positive levels, and the thresholds half-way between them.
  float positive[HALF], threshold[HALF - 1];

  explicit LloydMax(device const float* levels) {
    UNROLL
    for (int m = 0; m < HALF; m++) {
      positive[m] = levels[HALF + m];
    }
    UNROLL
    for (int m = 0; m < HALF - 1; m++) {
      threshold[m] = 0.5f * (positive[m] + positive[m + 1]);
    }
  }

  int code(float x, float size) const {
    int above = 0;
    UNROLL
    for (int m = 0; m < HALF - 1; m++) {
      above += fabs(x) > threshold[m] * size;
    }
    return x < 0 ? HALF - 1 - above : HALF + above;
  }

  // What the code stands for.
  float nearest(float x, float size) const {
    float quantized = positive[0];
    UNROLL
    for (int m = 0; m < HALF - 1; m++) {
      quantized = fabs(x) > threshold[m] * size ? positive[m + 1] : quantized;
    }
    return (x < 0 ? -quantized : quantized) * size;
  }
};

// The quantizer of segments with so many bits: levels are the middles of equal parts of the
// bytes.
struct Uniform {
  float width, count, part;

  Uniform(device const float* levels, int bits)
      : width(levels[WIDTH]), count(float(1 << bits)), part(float(256 >> bits)) {}

  int code(float x, float size) const {
    return int(clamp(floor((x / (size * width) + OFFSET) / part), 0.0f, count - 1.0f));
  }
  float nearest(float x, float size) const {
    return ((float(code(x, size)) + 0.5f) * part - OFFSET) * (size * width);
  }
};

// Writes D codes, each the nearest.
template <int D, typename Quantizer, int COUNT>
METAL_FUNC void round_channels(
    thread const float (&y)[COUNT], float size, thread const Quantizer& quantizer,
    threadgroup uint8_t* codes, int lane) {
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    if (32 * j + lane < D) {
      codes[32 * j + lane] = quantizer.code(y[j], size);
    }
  }
}

// The same, FEEDBACK_BLOCK channels after the others: what they lose, times their rows of `feedback`,
// (D, D), is added to those that come after them; the columns of others are zero.
template <int D, typename Quantizer, int COUNT, typename F>
METAL_FUNC void round_with_feedback(
    thread float (&y)[COUNT], float size, thread const Quantizer& quantizer,
    device const F* feedback, threadgroup uint8_t* codes, int lane) {
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    for (int first = 0; first < min(32, D - 32 * j); first += FEEDBACK_BLOCK) {
      const float lost = quantizer.nearest(y[j], size) - y[j];
      if (lane / FEEDBACK_BLOCK == first / FEEDBACK_BLOCK) {
        codes[32 * j + lane] = quantizer.code(y[j], size);
      }
      UNROLL
      for (int k = 0; k < FEEDBACK_BLOCK; k++) {
        const float one = simd_shuffle(lost, ushort(first + k));
        device const F* row = feedback + (32 * j + first + k) * D;
        UNROLL
        for (int i = j; i < COUNT; i++) {
          if (32 * i + lane < D) {
            y[i] += one * float(row[32 * i + lane]);
          }
        }
      }
    }
  }
}

// The scale of D codes that loses least, near the one that is `shift` steps above the root mean
// square.
template <int D, typename Quantizer, int COUNT>
METAL_FUNC int searched(
    thread const float (&y)[COUNT], thread const Quantizer& quantizer, float shift, int lane) {
  float square = 0;
  UNROLL
  for (int j = 0; j < COUNT; j++) {
    square += y[j] * y[j];
  }
  const float rms = max(sqrt(simd_sum(square) / D), 1e-20f);
  const float norm = rms * sqrt(float(D));
  const int start = int(clamp(rint((log2(rms) - LOWEST_OCTAVE) * STEPS_PER_OCTAVE + shift), -2.0f, 257.0f));
  float least = 0;
  int scale = 0;
  for (int k = 0; k < SEARCHED; k++) {
    // 0, -1, 1, -2, 2
    const int tried = clamp(start + (k % 2 ? -(k + 1) / 2 : k / 2), 0, 255);
    const float size = size_of(tried);
    float across = 0, along = 0;
    UNROLL
    for (int j = 0; j < COUNT; j++) {
      const float missing = 32 * j + lane < D ? y[j] - quantizer.nearest(y[j], size) : 0.0f;
      across += missing * missing;
      along += missing * y[j];
    }
    across = simd_sum(across);
    along = simd_sum(along) / norm;
    const float loss = across + ALONG * along * along;
    if (k == 0 || loss < least) {
      least = loss;
      scale = tried;
    }
  }
  return scale;
}

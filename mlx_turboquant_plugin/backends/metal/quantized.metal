// What decode.metal does with a tile of codes besides scores: weights and sums of values.
//
// For scores a lane has four neighbouring tokens of all rows, the first one 4 lane tokens into the
// tile. For sums it has some channels of all tokens, see ValueLayout.

// How the channels of token-major values are dealt to the lanes of a simdgroup.
//
// A unit is what one byte of low bits holds: FIELDS channels. A lane owns UNITS
// neighbouring units, if there are so many. Three bits of the affine codec are twelve bits
// at a time.
template <int D, int BITS, bool AFFINE>
struct ValueLayout {
  static constant constexpr const int FIELDS = BITS == 3 ? 4 : 8 / BITS;
  static constant constexpr const int ALL = D / FIELDS;
  static constant constexpr const int UNITS = ALL <= 32 ? 1 : ALL <= 64 ? 2 : ALL <= 128 ? 4 : 8;
  static constant constexpr const int CHANNELS = UNITS * FIELDS;
  // Bytes of a plane of one token; the affine codec pads to whole groups.
  static constant constexpr const int GROUP = D % 64 == 0 ? 64 : 32;
  static constant constexpr const int GROUPS = (D + GROUP - 1) / GROUP;
  static constant constexpr const int BYTES =
      AFFINE ? GROUPS * GROUP * BITS / 8 : (BITS == 3 ? D / 8 : D / FIELDS);
  static constant constexpr const int SCALES = AFFINE ? GROUPS : 1;

  // The channel of field `field` of unit `unit`.
  static int channel(int unit, int field) {
    if (AFFINE) {
      return unit * FIELDS + field;
    }
    if (BITS == 3) {
      return (unit / BYTES * 4 + field) * BYTES + unit % BYTES;
    }
    return field * BYTES + unit;
  }
};

// The codes of a lane's units from number `first` on, of one token: with 3 bits, the high bits of
// four fields above their low ones, or twelve bits of the affine codec.
template <typename Layout, int BITS, bool AFFINE>
METAL_FUNC void load_units(Planes planes, int first, thread uint (&codes)[Layout::UNITS]) {
  if (BITS != 3) {
    if (Layout::UNITS == 1) {
      codes[0] = planes.low[first];
    } else if (Layout::UNITS == 2) {
      uint two = *(device const ushort*)(planes.low + first);
      UNROLL
      for (int u = 0; u < Layout::UNITS; u++) {
        codes[u] = (two >> (8 * u)) & 255;
      }
    } else {
      device const uint* words = (device const uint*)(planes.low + first);
      UNROLL
      for (int u = 0; u < Layout::UNITS; u++) {
        codes[u] = (words[u / 4] >> (8 * (u % 4))) & 255;
      }
    }
  } else {
    UNROLL
    for (int u = 0; u < Layout::UNITS; u++) {
      int unit = first + u;
      if (AFFINE) {
        int byte = unit / 2 * 3 + unit % 2;
        uint two = planes.low[byte] | uint(planes.low[byte + 1]) << 8;
        codes[u] = (two >> (4 * (unit % 2))) & 4095;
      } else {
        bool upper = unit >= Layout::BYTES;
        int i = upper ? unit - Layout::BYTES : unit;
        uint low = upper ? planes.low_of_upper_fields[i] : planes.low[i];
        codes[u] = low | ((uint(planes.high[i]) >> (upper ? 4 : 0)) & 15) << 8;
      }
    }
  }
}

// The levels of a lane's channels of one token: x[FIELDS * u + field].
//   planes: of the token.
template <int D, int BITS, bool AFFINE, typename Scale, int CHANNELS>
METAL_FUNC void load_values(
    threadgroup const float* levels,
    Planes planes,
    device const Scale* scales,
    device const Scale* zeros,
    uint lane,
    thread float (&x)[CHANNELS]) {
  using Layout = ValueLayout<D, BITS, AFFINE>;
  const int first = lane * Layout::UNITS;
  UNROLL
  for (int k = 0; k < CHANNELS; k++) {
    x[k] = 0;
  }
  if (first >= Layout::ALL) {
    return;
  }
  uint codes[Layout::UNITS];
  load_units<Layout, BITS, AFFINE>(planes, first, codes);
  UNROLL
  for (int u = 0; u < Layout::UNITS; u++) {
    float scale = 1, zero = 0;
    if (AFFINE) {
      int group = (first + u) * Layout::FIELDS / Layout::GROUP;
      scale = float(scales[group]);
      zero = float(zeros[group]);
    }
    UNROLL
    for (int field = 0; field < Layout::FIELDS; field++) {
      uint code;
      if (BITS == 3 && !AFFINE) {
        code = ((codes[u] >> (2 * field)) & 3) | ((codes[u] >> (8 + field)) & 1) << 2;
      } else {
        code = Fields<BITS>::code(codes[u], field);
      }
      float value = level<AFFINE>(levels, code);
      x[u * Layout::FIELDS + field] = AFFINE ? value * scale + zero : value;
    }
  }
}

// Scores of a lane's tokens from index `own` on, `count` of which are there, become weights; and
// `rest` is added to them before. `limits`: what each row sees.
template <int ROWS, bool BIASED>
METAL_FUNC void weigh_codes(
    int own, int count, threadgroup const int* limits, threadgroup const float* rest,
    thread Softmax<ROWS>& softmax, thread float (&weights)[4][ROWS],
    thread float (&shrink)[ROWS]) {
  UNROLL
  for (int k = 0; k < 4; k++) {
    const int index = own + k;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      bool seen = k < count && index >= limits[r * 4 + 1] && index < limits[r * 4 + 2];
      weights[k][r] = seen ? weights[k][r] + (BIASED ? rest[r] : 0.0f) : MASKED;
    }
  }
  softmax.template add<4>(weights, shrink);
}

// The same weights, times the sizes of the values if they have one each, to [token][row].
template <bool AFFINE, int ROWS, typename Scale>
METAL_FUNC void share_weights(
    thread const float (&weights)[4][ROWS], device const Scale* scales, int count,
    threadgroup float* to) {
  UNROLL
  for (int k = 0; k < 4; k++) {
    float size = 0;
    if (k < count) {
      size = AFFINE ? 1.0f : size_of(uint(scales[k]));
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      to[k * ROWS + r] = weights[k][r] * size;
    }
  }
}

// Values, at the first of them.
template <typename Scale>
struct QuantizedValues {
  Planes planes;
  device const Scale* scales;
  device const Scale* zeros;
};

// Those from the token `first` on, with planes in bytes or, as those of mx.quantize are, words.
template <typename Layout, typename Plane, typename Scale>
METAL_FUNC QuantizedValues<Scale> values_from(
    size_t first, device const Plane* low, device const Plane* low_of_upper_fields,
    device const Plane* high, device const Scale* scales, device const Scale* zeros) {
  const size_t at = first * Layout::BYTES;
  return {
      {(device const uint8_t*)low + at,
       (device const uint8_t*)low_of_upper_fields + at,
       (device const uint8_t*)high + at},
      scales + first * Layout::SCALES,
      zeros + first * Layout::SCALES};
}

// Adds `count` values from index `start` on, times their weights. Those that make up a full step
// weigh nothing; `last`: that of the last value there is.
template <int D, int BITS, bool AFFINE, int ROWS, int ALL, typename Scale>
METAL_FUNC void add_values(
    thread const QuantizedValues<Scale>& values, int start, int count, int last,
    threadgroup const float* levels, threadgroup const float* weights, int lane,
    thread float (&sums)[ROWS][ALL]) {
  using Layout = ValueLayout<D, BITS, AFFINE>;
  // Values that are loaded at once.
  constexpr int STEP = Layout::CHANNELS <= 4 ? 4 : 2;
  for (int i = 0; i < count; i += STEP) {
    float x[STEP][Layout::CHANNELS];
    UNROLL
    for (int k = 0; k < STEP; k++) {
      const size_t token = min(start + i + k, last);
      const size_t at = token * Layout::BYTES;
      Planes planes = {
          values.planes.low + at, values.planes.low_of_upper_fields + at, values.planes.high + at};
      const size_t scale = token * Layout::SCALES;
      load_values<D, BITS, AFFINE>(
          levels, planes, values.scales + scale, values.zeros + scale, lane, x[k]);
    }
    UNROLL
    for (int k = 0; k < STEP; k++) {
      float weight[ROWS];
      load_rows<ROWS>(weights + (i + k) * ROWS, weight);
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int c = 0; c < Layout::CHANNELS; c++) {
          sums[r][c] += weight[r] * x[k][c];
        }
      }
    }
  }
}

// A lane's sums, to [row][channel].
template <int D, int BITS, bool AFFINE, int ROWS, int ALL>
METAL_FUNC void store_quantized(
    thread const float (&sums)[ROWS][ALL], threadgroup float* to, int lane) {
  using Layout = ValueLayout<D, BITS, AFFINE>;
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    UNROLL
    for (int u = 0; u < Layout::UNITS; u++) {
      int unit = lane * Layout::UNITS + u;
      for (int field = 0; field < Layout::FIELDS && unit < Layout::ALL; field++) {
        to[r * D + Layout::channel(unit, field)] = sums[r][u * Layout::FIELDS + field];
      }
    }
  }
}

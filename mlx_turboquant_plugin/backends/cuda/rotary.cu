// Rotary positions, by the tables of codecs/key_bias.py: see RotaryTable there.

struct Complex {
  float re, im;
};

__device__ inline Complex product(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.im * b.re + a.re * b.im};
}

struct RotaryPairs {
  const float *fine, *coarse_cos, *coarse_sin;  // (2 pairs, ANGLES) and (blocks, pairs)
  // The distances of the first channels of two pairs and of the channels of a pair.
  int pairs, between, distance;

  // Cosine and sine of the angle of pair f, by either table.
  __device__ Complex coarse(int f, long long block) const {
    return {__ldg(coarse_cos + block * pairs + f), __ldg(coarse_sin + block * pairs + f)};
  }
  __device__ Complex near(int f, int position) const {
    return {fine[f * ANGLES + position], fine[(pairs + f) * ANGLES + position]};
  }
};

// Channel c of a key bias (DIM,), turned to a position: as rotated_bias() in codes.metal.
__device__ inline float rotated_bias(
    const float* bias, const RotaryPairs& rotary, int c, int position) {
  if (c >= 2 * rotary.pairs) return bias[c];
  bool second = rotary.distance == 1 ? c % 2 == 1 : c >= rotary.distance;
  int other = second ? c - rotary.distance : c + rotary.distance;
  int first = second ? other : c, f = rotary.between == 2 ? first / 2 : first;
  Complex turn = product(
      rotary.coarse(f, position / ANGLES), rotary.near(f, position % ANGLES));
  return bias[c] * turn.re + bias[other] * (second ? turn.im : -turn.im);
}

// Keys and values of one layer, see tokens.metal. The first groups are for keys.
using KeyStored = StoredVector<DK, KEY_BITS, KEY_SEGMENTS, false>;
using ValueStored = StoredVector<DV, VALUE_BITS, 1, VALUE_AFFINE>;
constexpr int PITCH = KeyStored::PITCH > ValueStored::PITCH ? KeyStored::PITCH : ValueStored::PITCH;
constexpr int SEGMENT = KeyStored::SEGMENT;
// What a matrix rotates back, at most: no vector of a power of two, so none of the widest, for
// which there would be no memory.
constexpr int KEY_SCRATCH = (SEGMENT & (SEGMENT - 1)) == 0 ? 1 : SEGMENT;
constexpr int VALUE_SCRATCH = (DV & (DV - 1)) == 0 ? 1 : DV;
constexpr int SCRATCH = KEY_SCRATCH > VALUE_SCRATCH ? KEY_SCRATCH : VALUE_SCRATCH;

threadgroup uint8_t tile[TOKENS * PITCH];
threadgroup float known_levels[MOST_LEVELS];
threadgroup float all_scratch[SIMDS * SCRATCH];

const int thread_index = thread_position_in_threadgroup.x;
const int simd = simdgroup_index_in_threadgroup;
const int group = threadgroup_position_in_grid.x;
const int kv_index = threadgroup_position_in_grid.y;
const Places known(places);
const int key_groups = known.groups() + known.kept_groups();

if (group < key_groups) {
  const Planes planes = {
      (device const uint8_t*)k0, (device const uint8_t*)k1, (device const uint8_t*)k2};
  const Arrays<KT, KEY_SCALE> arrays = {
      older_keys, newer_keys, planes, key_scale, key_zero, key_rotation, levels,
      balance, bias, fine, coarse_cos, coarse_sin, layout, keys, kept_keys};
  lay_out<KeyStored, KEY_AFFINE, true, BALANCED, SORTED, BIASED>(
      arrays, known, tile, known_levels, all_scratch, group, kv_index, thread_index,
      simd);
} else {
  // Those of mx.quantize are words.
  const Planes planes = {
      (device const uint8_t*)v0, (device const uint8_t*)v1, (device const uint8_t*)v2};
  const Arrays<VT, VALUE_SCALE> arrays = {
      older_values, newer_values, planes, value_scale, value_zero, value_rotation, levels + MOST_LEVELS,
      balance, bias, fine, coarse_cos, coarse_sin, layout, values, kept_values};
  lay_out<ValueStored, VALUE_AFFINE, false, false, false, false>(
      arrays, known, tile, known_levels, all_scratch, group - key_groups, kv_index,
      thread_index, simd);
}

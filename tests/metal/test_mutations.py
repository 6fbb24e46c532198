"""Deliberate bugs in copies of the Metal kernels: the selftest's table notices each."""

import emulator
import mlx.core as mx
import pytest

from mlx_turboquant_plugin.backends import support
from mlx_turboquant_plugin.backends.metal import launch as metal
from mlx_turboquant_plugin.codecs.kv_codec import CodecSpec, KVCodec
from mlx_turboquant_plugin.tools.cases import QUICK
from mlx_turboquant_plugin.tools.selftest import check

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);\n"

# Only a trimmed cache makes codes for another number of tokens than a multiple of 32.
PARTIAL = "min(ENCODED, length - first)"

# What is wrong, the file, the text and what it becomes.
MUTATIONS = [
    (
        "no barrier between writing the rotated queries and reading them",
        "decode",
        BARRIER + "\nconst int rotary",
        "\nconst int rotary",
    ),
    (
        "no barrier between the queries and their rotation by a matrix",
        "attention",
        BARRIER + "  for (int c = thread_index",
        "  for (int c = thread_index",
    ),
    (
        "no barrier between the turned pairs of a bias and their use",
        "attention",
        SIMD_BARRIER + "  for (int f = 0; f < 2 * rotary",
        "  for (int f = 0; f < 2 * rotary",
    ),
    (
        "no barrier between the pairs of a bias and the weights",
        "attention",
        SIMD_BARRIER + "}\n\n// Products",
        "}\n\n// Products",
    ),
    (
        "no barrier between the simdgroups' sums and their merge",
        "decode",
        BARRIER + "merge_simdgroups",
        "merge_simdgroups",
    ),
    (
        "no barrier between the weights of full-precision tokens and their use",
        "full_precision",
        SIMD_BARRIER + "    add_full",
        "    add_full",
    ),
    (
        "no barrier before the next tile's weights",
        "decode",
        SIMD_BARRIER + "  }\n  store_quantized",
        "  }\n  store_quantized",
    ),
    (
        "no barrier between the partial sums and the rotation back",
        "merge",
        BARRIER,
        "\n",
    ),
    ("a stride one too short", "attention", "(start + d) * stride;", "(start + d) * (stride - 1);"),
    (
        "the tiles of a simdgroup overlap",
        "decode",
        "start += (splits - full_splits) * SIMDS * TILE",
        "start += (splits - full_splits) * TILE",
    ),
    ("the newest token is left out", "full_precision", "slot <= newest", "slot < newest"),
    (
        "the last codes are left out",
        "decode",
        "min(TILE, codes_to - start)",
        "min(TILE, codes_to - 4 - start)",
    ),
    (
        "a token is read exactly and through its code",
        "quantized",
        "index < limits[r * 4 + 2]",
        "index <= limits[r * 4 + 2]",
    ),
    ("one sink too many", "full_precision", "(slot < slots.sinks ?", "(slot <= slots.sinks ?"),
    (
        "queries see the tokens after them",
        "full_precision",
        " && slot <= newest",
        "",
    ),
    (
        "the bounds of another query",
        "decode",
        "(first_row + r) % count * 4",
        "(first_row + r) / count * 4 % (4 * count)",
    ),
    (
        "the halves of a byte of keys are swapped",
        "attention",
        "Byte::code(low[d] >> (8 * k), field)",
        "Byte::code(low[d] >> (8 * k), FIELDS - 1 - field)",
    ),
    (
        "the halves of a byte of values are swapped",
        "quantized",
        "::code(codes[u], field)",
        "::code(codes[u], Layout::FIELDS - 1 - field)",
    ),
    (
        "the high bits of the upper fields of keys",
        "attention",
        "(8 * k + field)) & 1",
        "(8 * k + field % 4)) & 1",
    ),
    (
        "the high bits of the upper fields of values",
        "quantized",
        "(upper ? 4 : 0)",
        "(upper ? 0 : 4)",
    ),
    (
        "no zero points of keys",
        "attention",
        "(AFFINE ? query_sums[r] * zero : 0.0f)",
        "0.0f",
    ),
    (
        "the scale of another group",
        "quantized",
        "* Layout::FIELDS / Layout::GROUP",
        "/ Layout::GROUP",
    ),
    (
        "sums do not shrink with a new maximum",
        "attention",
        "shrink[r] = fast::exp2(top[r] - best);",
        "shrink[r] = 1.0f;",
    ),
    (
        "no rescaling where simdgroups are merged",
        "attention",
        "float share = fast::exp2(statistics[(s * ROWS + r) * 2] - top);",
        "float share = 1.0f;",
    ),
    (
        "no rescaling where splits are merged",
        "splits",
        "float share = fast::exp2(own[s * stride + DV] - norm.top) * norm.inverse;",
        "float share = norm.inverse;",
    ),
    ("a learned sink has no weight", "splits", " + fast::exp2(learned - top)", ""),
    ("learned sinks in powers of e", "merge", " * LOG2_E", ""),
    (
        "learned sinks of the first KV head",
        "merge",
        "kv_index % (learned_sinks_shape",
        "0 % (learned_sinks_shape",
    ),
    ("learned sinks by position", "merge", "group + row / sizes[4];", "group + row % group;"),
    (
        "a full-precision split is rotated back",
        "splits",
        "s < full_splits ? x",
        "s + 1 < full_splits ? x",
    ),
    ("a butterfly with the wrong sign", "codes", "? other - x[j] :", "? x[j] - other :"),
    ("the output is not rotated back", "merge", "    walsh_hadamard<DV>(quantized, lane);\n", ""),
    (
        "the matrix is not transposed",
        "attention",
        "rotation[i * SEGMENT + c - first]",
        "rotation[(c - first) * SEGMENT + i]",
    ),
    ("no balance", "attention", "BALANCED ? balance[channel] : 1.0f", "1.0f"),
    (
        "queries are balanced before they are sorted",
        "attention",
        "balance[channel]",
        "balance[first + c]",
    ),
    (
        "queries are not sorted",
        "attention",
        "SORTED ? order[first + c] : first + c",
        "first + c",
    ),
    ("queries in the order of another head", "decode", "layout + kv_head * (DK + 1)", "layout"),
    (
        "orders of queries lie too close",
        "decode",
        "layout + kv_head * (DK + 1)",
        "layout + kv_head * DK",
    ),
    (
        "queries without signs",
        "attention",
        "      multiply_signs<SEGMENT>(x, rotation, lane);\n",
        "",
    ),
    (
        "both segments of a query are the first",
        "attention",
        "scratch + (first + i) * ROWS",
        "scratch + i * ROWS",
    ),
    ("levels of another segment", "attention", "(low[d], field % 2)", "(low[d], 0)"),
    ("the first size for both segments", "attention", "scales[s * stride + k]", "scales[k]"),
    (
        "sizes of segments are swapped",
        "attention",
        "sizes[field % SEGMENTS][k]",
        "sizes[SEGMENTS - 1 - field % SEGMENTS][k]",
    ),
    (
        "levels one byte apart",
        "attention",
        "      sizes[s][k] *= SEGMENTS == 1 ? 1.0f : levels[WIDTH];\n",
        "",
    ),
    ("the bits of the first head", "codes", "kv_head * (D + 1) + D", "D"),
    ("channels as bits", "codes", "kv_head * (D + 1) + D", "kv_head * (D + 1) + D - 1"),
    ("a bit of the code is masked", "codes", "256u - (256u >> bits)", "256u - (512u >> bits)"),
    (
        "both segments are masked alike",
        "codes",
        "s == 0 ? first_bits : 8 - first_bits",
        "first_bits",
    ),
    (
        "levels at the lower end of their parts",
        "codes",
        " |\n        (first ? middle[0] : middle[1])",
        "",
    ),
    ("the second code is not moved up", "codes", "codes << first_bits", "codes"),
    (
        "the second code is moved up by its own bits",
        "codes",
        "codes << first_bits",
        "codes << (8 - first_bits)",
    ),
    ("levels begin at zero", "codes", "& 255) - OFFSET", "& 255)"),
    ("the bias of another head", "decode", "kv_index % kv_heads;", "kv_index / kv_heads;"),
    (
        "the sine of the bias has the wrong sign",
        "attention",
        "q2 * b1 - q1 * b2",
        "q1 * b2 - q2 * b1",
    ),
    ("the bias at the start of its block", "codes", "within = position % ANGLES", "within = 0"),
    ("no channels without rotary positions", "quantized", "(BIASED ? rest[r] : 0.0f)", "0.0f"),
    ("rows beyond the last are read", "decode", "min(ROWS, rows - first_row)", "ROWS"),
    (
        "all blocks of rows are the first",
        "decode",
        "(kv_index * rows + first_row) * DK",
        "(kv_index * rows) * DK",
    ),
    ("no barrier between codes and their packing", "encode", BARRIER, "\n"),
    (
        "no barrier between a vector and its rotation",
        "codes",
        SIMD_BARRIER + "  UNROLL",
        "  UNROLL",
    ),
    (
        "no barrier between a rotation and the next vector",
        "codes",
        SIMD_BARRIER + "}\n\n// A simdgroup's vector times",
        "}\n\n// A simdgroup's vector times",
    ),
    ("vectors beyond the last are quantized", "encode", PARTIAL, "ENCODED"),
    ("the last vector is not written", "encode", "if (token < count)", "if (token < count - 1)"),
    (
        "a tile too narrow",
        "encode",
        "(size_t(kv_index) * BYTES + byte) * length + first",
        "(size_t(kv_index) * BYTES + byte) * count + first",
    ),
    (
        "negative channels become positive",
        "quantizer",
        "x < 0 ? HALF - 1 - above",
        "x < 0 ? HALF + above",
    ),
    (
        "the fields of a byte are swapped",
        "encode",
        "BITS * field : segment_shift",
        "BITS * (Byte::COUNT - 1 - field) : segment_shift",
    ),
    ("segments share bits", "encode", "field == 0 ? 8 - first_bits", "field == 0 ? 7 - first_bits"),
    (
        "the first code is moved up by its own bits",
        "encode",
        "field == 0 ? 8 - first_bits",
        "field == 0 ? first_bits",
    ),
    ("the high bits of half the fields", "encode", ">> 2u) << field", ">> 2u) << (field % 4)"),
    (
        "thresholds at the lower level",
        "quantizer",
        "0.5f * (positive[m] + positive[m + 1])",
        "positive[m]",
    ),
    ("sizes are not searched", "quantizer", "k < SEARCHED", "k < 1"),
    ("the last size that was tried", "quantizer", "      least = loss;\n", ""),
    ("errors along the vector are free", "quantizer", "+ ALONG * along * along", ""),
    ("the bias is not taken away", "quantizer", "y[j] -= rotated_bias(", "rotated_bias("),
    (
        "the bias of another head in codes",
        "encode",
        "kv_index % x_shape[1]",
        "kv_index / x_shape[1]",
    ),
    (
        "the bias of codes turns the other way",
        "codes",
        "second ? turn.y : -turn.y",
        "second ? -turn.y : turn.y",
    ),
    ("positions of codes count from 0", "encode", "start + first + token", "first + token"),
    ("keys are multiplied by the balance", "quantizer", "y[j] /= known", "y[j] *= known"),
    ("matrices are transposed", "codes", "matrix[i * D + c]", "matrix[c * D + i]"),
    ("vectors without signs", "quantizer", "    multiply_signs<D>(y, rotation, lane);\n", ""),
    ("uniform codes are rounded down", "quantizer", "/ part)", "/ part - 0.5f)"),
    ("uniform codes of one bit more", "quantizer", "count - 1.0f", "count + count - 1.0f"),
    ("parts of half the width", "quantizer", "256 >> bits", "128 >> bits"),
    (
        "sizes are tried with the lower ends of parts",
        "quantizer",
        "(code(x, size)) + 0.5f)",
        "(code(x, size)))",
    ),
    ("sizes are tried around the root mean square", "encode", "levels[bits], lane", "0.0f, lane"),
    (
        "sizes are tried where those of the other segment are",
        "encode",
        "levels[bits], lane",
        "levels[8 - bits], lane",
    ),
    (
        "segments swap their bits",
        "encode",
        "s == 0 ? first_bits : 8 - first_bits",
        "s == 1 ? first_bits : 8 - first_bits",
    ),
    ("errors are not fed back", "encode", "if (FED_BACK) {", "if (false) {"),
    (
        "errors are fed back as in another head",
        "encode",
        "(kv_head * SEGMENTS + s) * SEGMENT",
        "s * SEGMENT",
    ),
    (
        "errors are fed back as in the first segment",
        "encode",
        "(kv_head * SEGMENTS + s) * SEGMENT",
        "kv_head * SEGMENTS * SEGMENT",
    ),
    (
        "errors are fed back the wrong way",
        "quantizer",
        "y[i] += one * float(",
        "y[i] -= one * float(",
    ),
    ("the error of one channel for a block", "quantizer", "ushort(first + k)", "ushort(first)"),
    (
        "all blocks of channels as the first 32",
        "quantizer",
        "(32 * j + first + k) * D",
        "(first + k) * D",
    ),
    (
        "errors stay in their 32 channels",
        "quantizer",
        "for (int i = j; i < COUNT; i++)",
        "for (int i = j; i <= j; i++)",
    ),
    (
        "codes of one lane of a block",
        "quantizer",
        "lane / FEEDBACK_BLOCK == first / FEEDBACK_BLOCK",
        "lane == first",
    ),
    (
        "keys are not sorted",
        "quantizer",
        "SORTED ? known.order[place] : place",
        "place",
    ),
    ("keys in the order of another head", "encode", "layout + kv_head * (D + 1)", "layout"),
    (
        "orders of keys lie too close",
        "encode",
        "layout + kv_head * (D + 1)",
        "layout + kv_head * D",
    ),
    (
        "keys are balanced after they are sorted",
        "quantizer",
        "known.balance[c]",
        "known.balance[place]",
    ),
    (
        "the bias is taken away from sorted keys",
        "quantizer",
        "known.distance, c,",
        "known.distance, place,",
    ),
    (
        "one size for both segments",
        "encode",
        "(size_t(kv_index) * SEGMENTS + s) * length",
        "size_t(kv_index) * SEGMENTS * length",
    ),
    (
        "channels of a pair are neighbours",
        "codes",
        "distance == 1 ? c % 2 == 1 :",
        "true ? c % 2 == 1 :",
    ),
    ("the angle of another pair", "codes", "first = second ? other : c,", "first = c,"),
    ("all channels are turned", "codes", "if (c >= 2 * pairs) {", "if (c >= 4096) {"),
    (
        "no barrier between codes and their reading",
        "tokens",
        BARRIER + "  for (int token = simd",
        "  for (int token = simd",
    ),
    (
        "two planes are swapped",
        "tokens",
        "p == 1 ? planes.low_of_upper_fields : planes.high",
        "p == 1 ? planes.high : planes.low_of_upper_fields",
    ),
    (
        "all planes in one place",
        "tokens",
        "p * Stored::BYTES + i % Stored::BYTES",
        "i % Stored::BYTES",
    ),
    ("the bytes of a word backwards", "tokens", "(four >> (8 * k))", "(four >> (24 - 8 * k))"),
    ("the codes of another head", "tokens", "(head * quantized + begin)", "begin"),
    (
        "the size of another head",
        "tokens",
        "(size_t(kv_index) * Stored::SEGMENTS + s)",
        "(size_t(0) + s)",
    ),
    ("the size of the first segment", "tokens", "Stored::SEGMENTS + s)", "Stored::SEGMENTS)"),
    ("the levels of the first segment", "tokens", "(codes[i], s)", "(codes[i], 0)"),
    ("decoded levels one byte apart", "tokens", " * known_levels[WIDTH]", ""),
    (
        "decoded channels stay sorted",
        "tokens",
        "SORTED ? order[place] : place",
        "place",
    ),
    (
        "decoded channels in the order of another head",
        "tokens",
        "layout + kv_head * (Stored::DIM + 1)",
        "layout",
    ),
    (
        "orders of decoded keys lie too close",
        "tokens",
        "layout + kv_head * (Stored::DIM + 1)",
        "layout + kv_head * Stored::DIM",
    ),
    (
        "decoded keys are balanced while sorted",
        "tokens",
        "balance[first + c]",
        "balance[first + place]",
    ),
    (
        "sorted keys get their bias",
        "tokens",
        "places.distance, c, places.start",
        "places.distance, place, places.start",
    ),
    ("no zero points", "tokens", " + float(arrays.zeros[at])", ""),
    ("the scale of the first group", "tokens", "+ i / Stored::GROUP", ""),
    ("codes before the first that counts", "tokens", "index < places.first || ", ""),
    (
        "one code too many",
        "tokens",
        "index >= places.first + places.decoded",
        "index > places.first + places.decoded",
    ),
    ("a tile of codes that goes on", "tokens", "min(TOKENS, places.quantized - begin)", "TOKENS"),
    ("a tile of tokens that goes on", "tokens", "min(TOKENS, total - decoded - begin)", "TOKENS"),
    ("the signs are not undone", "tokens", "    multiply_signs<D>(y, rotation, lane);\n", ""),
    (
        "decoded keys without their balance",
        "tokens",
        "y[j] *= arrays.balance[first + c];",
        "",
    ),
    ("the balance of another head", "tokens", "first = kv_head * Stored::DIM", "first = 0"),
    ("decoded keys without their bias", "tokens", "y[j] += rotated_bias(", "rotated_bias("),
    ("positions of decoded keys count from 0", "tokens", "places.start + index", "index"),
    (
        "decoded tokens stand where zeros belong",
        "tokens",
        "places.left + places.sinks + index - places.first",
        "places.sinks + index - places.first",
    ),
    ("sinks stand where zeros belong", "tokens", "slot = token - left", "slot = token"),
    (
        "one sink too few before the codes",
        "tokens",
        "token < left + places.sinks ?",
        "token + 1 < left + places.sinks ?",
    ),
    (
        "full-precision tokens are one too new",
        "tokens",
        "slot - places.sinks + first",
        "slot - places.sinks + first + 1",
    ),
    (
        "new tokens begin later",
        "tokens",
        "newer_count + slot - places.older_count",
        "newer_count + slot",
    ),
    (
        "the last old token is new",
        "tokens",
        "slot < places.older_count",
        "slot < places.older_count - 1",
    ),
    (
        "what is kept begins elsewhere",
        "tokens",
        "keeps ? places.kept_first :",
        "keeps ? places.full_first :",
    ),
    (
        "new tokens of another head",
        "tokens",
        "(token * places.heads + kv_head)",
        "(token * places.heads)",
    ),
    (
        "the groups of values begin too early",
        "dequantize",
        "group - key_groups, kv_index",
        "group, kv_index",
    ),
    (
        "values are dequantized with the levels of keys",
        "dequantize",
        "levels + MOST_LEVELS",
        "levels",
    ),
    (
        "low bits of the upper fields",
        "codes",
        "BYTES + byte] >> (2 * (field % 4))",
        "BYTES + byte] >> (2 * (field / 2))",
    ),
    (
        "high bits of the lower fields",
        "codes",
        "BYTES + byte] >> field)",
        "BYTES + byte] >> (field % 4))",
    ),
    ("codes that end in the next byte", "codes", "shift + BITS > 8 ? bytes[byte + 1] : 0", "0"),
    (
        "fields of a stored byte backwards",
        "codes",
        "Byte::code(bytes[byte], field)",
        "Byte::code(bytes[byte], Byte::COUNT - 1 - field)",
    ),
    ("stored vectors overlap", "codes", "PLANES * BYTES + 4", "BYTES + 4"),
]


@pytest.fixture
def few_splits(monkeypatch):
    """Each simdgroup has several tiles, and prompts are dequantized."""
    monkeypatch.setattr(metal, "MAX_SPLITS", 1)
    monkeypatch.setattr(support, "on_gpu", lambda: True)
    metal.kernel.cache_clear()
    yield
    metal.kernel.cache_clear()


def test_every_bug_has_its_place():
    """After a change of the kernels, too; the bugs themselves take longer to try."""
    places = {what: metal.source(file).count(text) for what, file, text, _ in MUTATIONS}
    assert {what: n for what, n in places.items() if n != 1} == {}


@pytest.mark.slow
@pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))
@pytest.mark.parametrize("what, file, text, wrong", MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_a_bug_is_noticed(what, file, text, wrong, few_splits, monkeypatch):
    source = metal.source

    def mutated(name):
        return source(name).replace(text, wrong) if name == file else source(name)

    assert source(file).count(text) == 1
    monkeypatch.setattr(metal, "source", mutated)
    with emulator.patch(mode="checked", schedule=2, poison=0):
        if text == PARTIAL:
            with pytest.raises(emulator.EmulatorError):
                mx.eval(metal.encode_values(KVCodec(CodecSpec(64, 64)), mx.ones((1, 1, 45, 64))))
            return
        # Prompts are the last ones.
        cases = QUICK[::-1] if file in ("dequantize", "tokens") else QUICK
        results = (check(case, "metal") for case in cases)
        failed = next((result for result in results if not result.ok), None)
    assert failed is not None, f"nobody notices: {what}"
    assert "does not compile" not in failed.note

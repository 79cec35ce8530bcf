// Quantised linear layers: GGUF weights kept packed, int8 activations. The level's side of quant.h:
// quant_prepare and quant_multiply, which LinearKernels' prepare and multiply call for these formats.
// The integer vectors (quant_avx2.inl or quant_avx512.inl) come before.

#include "quant_tile.inl"

inline Ready ready_block(const float* x) {
  constexpr float kTiny = 1e-30f, kHuge = 3e33f;  // between them 1 / scale and kMagic * scale are finite
  __m256 part[4];
  __m256i most = _mm256_setzero_si256();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int i = 0; i < 4; i++) {
    part[i] = _mm256_loadu_ps(x + 8 * i);
    // As integers, magnitudes compare as the floats do, and those that are not finite come last.
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(part[i]), magnitude));
  }
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float most_value = _mm_cvtss_f32(_mm_castsi128_ps(four));

  Ready made;
  float inverse = 0.0f;
  if (most_value >= kTiny && most_value <= kHuge) {
    const float exact = most_value / 127.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &exact, 4);
    bits = (bits + 3) & ~3;
    __builtin_memcpy(&made.scale, &bits, 4);
    inverse = 1.0f / made.scale;
  } else {
    made.scale = most_value < kTiny ? 0.0f : __builtin_nanf("");
  }
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i code[4];
  for (int i = 0; i < 4; i++) code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], factor));
  const __m256i words0 = _mm256_packs_epi32(code[0], code[1]), words1 = _mm256_packs_epi32(code[2], code[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), order);
  if (inverse == 0.0f) codes = _mm256_setzero_si256();
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(made.codes), codes);

  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), codes), ones);
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xb1));
  const int32_t low = _mm256_cvtsi256_si32(sums), high = _mm256_extract_epi32(sums, 4), sum = low + high;
  made.unmagic = -kMagic * made.scale;
  made.total = made.scale * static_cast<float>(sum);
  made.start[static_cast<int>(Start::zero8)] = kMagicBits - 8 * sum;
  made.start[static_cast<int>(Start::zero16)] = kMagicBits - 16 * sum;
  made.start[static_cast<int>(Start::zero128)] = kMagicBits - 128 * sum;
  made.start[static_cast<int>(Start::zero32_low)] = kMagicBits - 32 * low;
  made.start[static_cast<int>(Start::zero32_high)] = kMagicBits - 32 * high;
  return made;
}

inline void quant_prepare(Format, const float* x, int64_t, int64_t first, int64_t count, void* ready) {
  Ready* row = static_cast<Ready*>(ready) + first / 32;
  for (int64_t b = 0; b < count / 32; b++) row[b] = ready_block(x + 32 * b);
}

inline void quant_multiply(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                           int64_t last_group, float* out, int64_t out_stride, void* scratch,
                           const Upcoming* upcoming) {
  if (quant::kParts == 1 && quant_vnni()) {
    return quant_multiply_vnni(weight, ready, rows, first_group, last_group, out, out_stride, scratch, upcoming);
  }
  quant::multiply_tiles(weight, ready, rows, first_group, last_group, out, out_stride, scratch, upcoming);
}

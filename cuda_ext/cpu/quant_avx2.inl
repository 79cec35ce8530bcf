// Integer vectors of the quantised kernels, AVX2: two vectors are a line, 8 rows of 4 codes each.
// Same names and meanings as quant_avx512.inl; `part` says which half of a line.

namespace quant {

constexpr int kParts = 2;
constexpr int kTileRows = 3;    // with 4, gcc keeps integer sums on the stack
constexpr int kTileGroups = 1;
constexpr int kDirectRows = 12, kDirectRows4 = 12;  // see multiply_groups

using Int = __m256i;

inline Int load_line(const uint8_t* p, int part) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part);
}
inline void store_line(uint8_t* p, int part, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + part, x); }
inline Int splat(int32_t x) { return _mm256_set1_epi32(x); }
inline Int both(Int x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(mask))); }
inline Int either(Int a, Int b) { return _mm256_or_si256(a, b); }
inline Int up(Int x, int n) { return _mm256_slli_epi16(x, n); }
inline Int down(Int x, int n) { return _mm256_srli_epi16(x, n); }
inline V float_bits(Int x) { return _mm256_castsi256_ps(x); }
inline V halves(const uint8_t* p, int part) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + part));
}
inline __m128i eight(const uint8_t* p, int part) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * part));
}
inline V unsigned_bytes(const uint8_t* p, int part) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p, part)));
}
inline V signed_bytes(const uint8_t* p, int part) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p, part)));
}

constexpr bool kSignedBytes = true;  // 8-bit codes are multiplied as they are, not 128 more

inline Int pairs(Int products) { return _mm256_madd_epi16(products, _mm256_set1_epi16(1)); }

// The sum of a block of 4-bit codes stays in 16 bits: 16 products of at most 15 * 127.
template <int kBits>
inline Int begin_sum(int32_t start) {
  return kBits == 4 ? _mm256_setzero_si256() : splat(start);
}
template <int kBits>
inline Int end_sum(Int sum, int32_t start) {
  return kBits == 4 ? _mm256_add_epi32(pairs(sum), splat(start)) : sum;
}
template <int kBits>
inline void add_products(Int& sum, Int codes, Int x) {
  if constexpr (kBits == 4) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  } else if constexpr (kBits < 8) {
    sum = _mm256_add_epi32(sum, pairs(_mm256_maddubs_epi16(codes, x)));
  } else {
    // Hazard: two products of 8-bit codes exceed 16 bits and vpmaddubsw saturates. So the bytes are taken as
    // signed (128 less, which `start` knows) and the sign goes over to x.
    const Int value = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    sum = _mm256_add_epi32(sum, pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(x, value))));
  }
}

}  // namespace quant

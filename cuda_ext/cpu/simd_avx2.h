// Eight-lane vectors (AVX2, FMA, F16C). Same names and meanings as simd_avx512.h.
// Include inside the level's own anonymous namespace, after <immintrin.h>.

constexpr int W = 8;      // lanes
constexpr int kRows = 6;  // rows of a register tile: kRows * kCols accumulators fit the registers
constexpr int kCols = 2;  // vectors of a register tile; even
constexpr int kFew = 3;   // queries that meet keys without columns in between

using V = __m256;
using Mask = __m256;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
// A NaN in b comes through; one in a does not.
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline float hsum(V a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float hmax(V a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n, n whole and within -126 .. 127
inline V scale2(V a, V n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline V iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

// Lanes first <= i < last.
inline __m256i lane_words(int first, int last) {
  const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), i),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(last), i));
}
inline Mask lanes(int first, int last) { return _mm256_castsi256_ps(lane_words(first, last)); }
// The lanes whose bits are set.
inline Mask bit_lanes(unsigned bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each));
}
inline V select(Mask m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
inline Mask below(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline unsigned equal_bits(V a, V b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
}

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load16(const void* p, int n) {
  alignas(16) uint16_t part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  __builtin_memcpy(part, p, static_cast<size_t>(n) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
}
inline void store16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
inline void store16(void* p, __m128i x, int n) {
  alignas(16) uint16_t part[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), x);
  __builtin_memcpy(p, part, static_cast<size_t>(n) * 2);
}
inline V widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const bf16* p) { return widen(load16(p)); }
inline V load(const f16* p) { return _mm256_cvtph_ps(load16(p)); }
// The first n lanes, zero in the others.
inline V load(const float* p, int n) { return _mm256_maskload_ps(p, lane_words(0, n)); }
inline V load(const bf16* p, int n) { return widen(load16(p, n)); }
inline V load(const f16* p, int n) { return _mm256_cvtph_ps(load16(p, n)); }

// The low halves of eight 32-bit words.
inline __m128i low_halves(__m256i x) {
  const __m256i clear = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(clear), _mm256_extracti128_si256(clear, 1));
}
// Rounds to nearest, ties to even; a NaN stays one.
inline __m128i narrow(V x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  return low_halves(_mm256_srli_epi32(r, 16));
}
inline __m128i half(V x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline void store(bf16* p, V x) { store16(p, narrow(x)); }
inline void store(f16* p, V x) { store16(p, half(x)); }
inline void store(float* p, V x, int n) { _mm256_maskstore_ps(p, lane_words(0, n), x); }
inline void store(bf16* p, V x, int n) { store16(p, narrow(x), n); }
inline void store(f16* p, V x, int n) { store16(p, half(x), n); }

using Words = __m256i;
// W words of 32 bits; the first n of them, zero in the others.
inline Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Words load_words(const void* p, int n) {
  return _mm256_maskload_epi32(static_cast<const int*>(p), lane_words(0, n));
}

// W by W words, turned: word j of w[i] becomes word i of w[j].
[[gnu::always_inline]] inline void turn(Words w[8]) {
  Words x[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {  // pairs of rows
    x[i] = _mm256_unpacklo_epi32(w[i], w[i + 1]);
    x[i + 1] = _mm256_unpackhi_epi32(w[i], w[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // fours of rows: lane k of w[i + j] is column 4 k + j
    w[i] = _mm256_unpacklo_epi64(x[i], x[i + 2]);
    w[i + 1] = _mm256_unpackhi_epi64(x[i], x[i + 2]);
    w[i + 2] = _mm256_unpacklo_epi64(x[i + 1], x[i + 3]);
    w[i + 3] = _mm256_unpackhi_epi64(x[i + 1], x[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const Words both = w[j];
    w[j] = _mm256_permute2x128_si256(both, w[j + 4], 0x20);
    w[j + 4] = _mm256_permute2x128_si256(both, w[j + 4], 0x31);
  }
}
inline V low(const float*, __m256i x) { return _mm256_castsi256_ps(x); }
inline V low(const bf16*, __m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline V high(const bf16*, __m256i x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V low(const f16*, __m256i x) { return _mm256_cvtph_ps(low_halves(x)); }
inline V high(const f16*, __m256i x) { return _mm256_cvtph_ps(low_halves(_mm256_srli_epi32(x, 16))); }

// x0 y0 x1 y1 ..., the first half of it into x.
inline void interleave(V& x, V& y) {
  const V a = _mm256_unpacklo_ps(x, y), b = _mm256_unpackhi_ps(x, y);
  x = _mm256_permute2f128_ps(a, b, 0x20);
  y = _mm256_permute2f128_ps(a, b, 0x31);
}

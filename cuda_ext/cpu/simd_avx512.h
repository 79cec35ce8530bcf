// Sixteen-lane vectors (AVX-512 F, BW, VL, DQ). Same names and meanings as simd_avx2.h.
// Include inside the level's own anonymous namespace, after <immintrin.h>.

constexpr int W = 16;       // lanes
constexpr int kRows = 6;    // rows of a register tile: kRows * kCols accumulators fit the registers
constexpr int kCols = 4;    // vectors of a register tile; even
constexpr int kFew = 4;     // queries that meet keys without columns in between

using V = __m512;
using Mask = __mmask16;

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// A NaN in b comes through; one in a does not.
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline float hsum(V a) { return _mm512_reduce_add_ps(a); }
inline float hmax(V a) { return _mm512_reduce_max_ps(a); }
inline V round(V a) { return _mm512_roundscale_ps(a, 0); }
inline V scale2(V a, V n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n whole
inline V iota() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Lanes first <= i < last.
inline Mask lanes(int first, int last) {
  const unsigned below_last = last >= 16 ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
  const unsigned below_first = first >= 16 ? 0xffffu : first <= 0 ? 0u : (1u << first) - 1;
  return static_cast<Mask>(below_last & ~below_first);
}
// The lanes whose bits are set.
inline Mask bit_lanes(unsigned bits) { return static_cast<Mask>(bits); }
inline V select(Mask m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
inline Mask below(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline unsigned equal_bits(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The first n lanes, zero in the others.
inline V load(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(0, n), p); }
inline V load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(0, n), p)); }
inline V load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(0, n), p)); }

// Rounds to nearest, ties to even; a NaN stays one.
inline __m256i narrow(V x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
inline __m256i half(V x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void store(bf16* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store(f16* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half(x)); }
inline void store(float* p, V x, int n) { _mm512_mask_storeu_ps(p, lanes(0, n), x); }
inline void store(bf16* p, V x, int n) { _mm256_mask_storeu_epi16(p, lanes(0, n), narrow(x)); }
inline void store(f16* p, V x, int n) { _mm256_mask_storeu_epi16(p, lanes(0, n), half(x)); }

using Words = __m512i;
// W words of 32 bits; the first n of them, zero in the others.
inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
inline Words load_words(const void* p, int n) { return _mm512_maskz_loadu_epi32(lanes(0, n), p); }

// W by W words, turned: word j of w[i] becomes word i of w[j].
[[gnu::always_inline]] inline void turn(Words w[16]) {
  V r[16], x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_castsi512_ps(w[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    x[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    x[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // fours of rows: lane k of r[i + j] is column 4 k + j
    r[i] = _mm512_shuffle_ps(x[i], x[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(x[i], x[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(x[i + 1], x[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(x[i + 1], x[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    x[j] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
    x[j + 4] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    x[j + 8] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
    x[j + 12] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    w[j] = _mm512_castps_si512(_mm512_shuffle_f32x4(x[j], x[j + 8], 0x88));
    w[j + 8] = _mm512_castps_si512(_mm512_shuffle_f32x4(x[j], x[j + 8], 0xdd));
    w[j + 4] = _mm512_castps_si512(_mm512_shuffle_f32x4(x[j + 4], x[j + 12], 0x88));
    w[j + 12] = _mm512_castps_si512(_mm512_shuffle_f32x4(x[j + 4], x[j + 12], 0xdd));
  }
}
inline V low(const float*, __m512i x) { return _mm512_castsi512_ps(x); }
inline V low(const bf16*, __m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline V high(const bf16*, __m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V low(const f16*, __m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
inline V high(const f16*, __m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))); }

// x0 y0 x1 y1 ..., the first half of it into x.
inline void interleave(V& x, V& y) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const V low_half = _mm512_permutex2var_ps(x, first, y);
  y = _mm512_permutex2var_ps(x, _mm512_add_epi32(first, _mm512_set1_epi32(8)), y);
  x = low_half;
}

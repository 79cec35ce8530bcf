// Sixteen-lane vectors (AVX-512 F, BW, VL, DQ). Same names and meanings as simd_avx2.h.
// Include inside the level's own anonymous namespace, after <immintrin.h>.

constexpr int W = 16;       // lanes
constexpr int kRows = 6;    // rows of a register tile: kRows * kCols accumulators fit the registers
constexpr int kCols = 4;    // vectors of a register tile

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

// Sixteen bytes from each of W rows, turned: out[j] holds the j-th 32-bit word of every row, in row order.
inline void turn(const void* const* rows, size_t offset, __m512i out[4]) {
  __m512 r[4];
  for (int i = 0; i < 4; i++) {
    const auto at = [&](int lane) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(rows[4 * lane + i]) + offset));
    };
    r[i] = _mm512_castps128_ps512(at(0));
    r[i] = _mm512_insertf32x4(r[i], at(1), 1);
    r[i] = _mm512_insertf32x4(r[i], at(2), 2);
    r[i] = _mm512_insertf32x4(r[i], at(3), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
  const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
  out[0] = _mm512_castps_si512(_mm512_shuffle_ps(a, c, 0x44));
  out[1] = _mm512_castps_si512(_mm512_shuffle_ps(a, c, 0xee));
  out[2] = _mm512_castps_si512(_mm512_shuffle_ps(b, d, 0x44));
  out[3] = _mm512_castps_si512(_mm512_shuffle_ps(b, d, 0xee));
}
inline V low(const float*, __m512i x) { return _mm512_castsi512_ps(x); }
inline V low(const bf16*, __m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline V high(const bf16*, __m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V low(const f16*, __m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
inline V high(const f16*, __m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))); }
using Words = __m512i;

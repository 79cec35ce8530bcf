// Integer vectors of the quantised kernels, AVX-512: one vector is a line, 16 rows of 4 codes.
// ASERVE_VNNI set: the products by vpdpbusd; else by vpmaddubsw, as in quant_avx2.inl.

namespace quant {

constexpr int kParts = 1;      // vectors of a line
constexpr int kTileRows = 6;   // of a register tile over kTileGroups groups
constexpr int kTileGroups = 2;
constexpr int kDirectRows = 64, kDirectRows4 = 192;  // see multiply_groups

using Int = __m512i;

inline Int load_line(const uint8_t* p, int) { return _mm512_loadu_si512(p); }
inline void store_line(uint8_t* p, int, Int x) { _mm512_storeu_si512(p, x); }
inline Int splat(int32_t x) { return _mm512_set1_epi32(x); }
inline Int both(Int x, int mask) { return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask))); }
inline Int either(Int a, Int b) { return _mm512_or_si512(a, b); }
inline Int up(Int x, int n) { return _mm512_slli_epi16(x, static_cast<unsigned>(n)); }
inline Int down(Int x, int n) { return _mm512_srli_epi16(x, static_cast<unsigned>(n)); }
inline V float_bits(Int x) { return _mm512_castsi512_ps(x); }
inline V halves(const uint8_t* p, int) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m128i sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline V unsigned_bytes(const uint8_t* p, int) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen(p))); }
inline V signed_bytes(const uint8_t* p, int) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(p))); }

#ifdef ASERVE_VNNI

constexpr bool kSignedBytes = false;

template <int kBits>
inline Int begin_sum(int32_t start) {
  return splat(start);
}
template <int kBits>
inline Int end_sum(Int sum, int32_t) {
  return sum;
}
// Hazard: as an intrinsic, gcc 12 copies the accumulators of a tile between registers and stack.
template <int kBits>
inline void add_products(Int& sum, Int codes, Int x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

#else

constexpr bool kSignedBytes = true;  // 8-bit codes are multiplied as they are, not 128 more

inline Int pairs(Int products) { return _mm512_madd_epi16(products, _mm512_set1_epi16(1)); }

// The sum of a block of 4-bit codes stays in 16 bits: 16 products of at most 15 * 127.
template <int kBits>
inline Int begin_sum(int32_t start) {
  return kBits == 4 ? _mm512_setzero_si512() : splat(start);
}
template <int kBits>
inline Int end_sum(Int sum, int32_t start) {
  return kBits == 4 ? _mm512_add_epi32(pairs(sum), splat(start)) : sum;
}
template <int kBits>
inline void add_products(Int& sum, Int codes, Int x) {
  if constexpr (kBits == 4) {
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, x));
  } else if constexpr (kBits < 8) {
    sum = _mm512_add_epi32(sum, pairs(_mm512_maddubs_epi16(codes, x)));
  } else {
    // Hazard: two products of 8-bit codes exceed 16 bits and vpmaddubsw saturates. So the bytes are taken as
    // signed (128 less, which `start` knows) and the sign goes over to x.
    const Int value = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
    const Int turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(value), _mm512_setzero_si512(), x);
    sum = _mm512_add_epi32(sum, pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(value), turned)));
  }
}

#endif

}  // namespace quant

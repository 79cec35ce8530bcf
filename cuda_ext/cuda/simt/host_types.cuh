// CUDA's vector and narrow floating-point types for the emulation. Conversions are written from the formats'
// definitions (IEEE 754 binary16; bfloat16; OCP 8-bit formats E4M3 and E5M2), rounding to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct f16_t { uint16_t bits; };
struct bf16_t { uint16_t bits; };
struct e4m3_t { uint8_t bits; };
struct e5m2_t { uint8_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16_t x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Read as float32 the exponent is 112 too small; the product is exact, subnormals included.
  float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) value = std::bit_cast<float>(0x7f800000u | magnitude << 13);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}
inline float to_float(e5m2_t x) { return to_float(f16_t{static_cast<uint16_t>(x.bits << 8)}); }
inline float to_float(e4m3_t x) {
  if ((x.bits & 0x7f) == 0x7f) return std::bit_cast<float>(0x7fc00000u);
  const float value = std::bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7f) << 20) * 0x1p120f;
  return x.bits & 0x80 ? -value : value;
}

namespace simt {

// x rounded to nearest even at a format with `mantissa` stored bits, least normal exponent `lowest` and
// exponent field offset `bias`; no sign, and what is too great runs past the format's last code.
inline uint32_t round_to(float x, int mantissa, int lowest, int bias) {
  if (x == 0) return 0;
  int exponent;
  std::frexp(x, &exponent);
  exponent = exponent - 1 < lowest ? lowest : exponent - 1;
  const double steps = std::nearbyint(std::ldexp(static_cast<double>(x), mantissa - exponent));
  return static_cast<uint32_t>(steps) + (static_cast<uint32_t>(exponent + bias - 1) << mantissa);
}

}  // namespace simt

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16_t from_float<f16_t>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  uint32_t code;
  if (magnitude >= 0x47800000u) {
    code = 0x7c00u;  // 65536 and more
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition itself.
    code = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    code = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | code)};
}
template <>
inline e4m3_t from_float<e4m3_t>(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 24 & 0x80u;
  if (x != x) return {0x7f};
  const uint32_t code = std::fabs(x) >= 448.0f ? 0x7eu : simt::round_to(std::fabs(x), 3, -6, 7);
  return {static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code))};
}
template <>
inline e5m2_t from_float<e5m2_t>(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 24 & 0x80u;
  if (x != x) return {0x7f};
  const uint32_t code = std::fabs(x) >= 57344.0f ? 0x7bu : simt::round_to(std::fabs(x), 2, -14, 15);
  return {static_cast<uint8_t>(sign | (code > 0x7bu ? 0x7bu : code))};
}

template <typename T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Warp operations of the emulation. Every lane named in the mask waits with a struct of its own; the last to
// arrive reads and writes all of them, so that no value passes between lanes in any other way.
#pragma once

#include <algorithm>
#include <cmath>

#include "host_threads.cuh"

namespace simt {

template <typename T>
struct Exchange {
  T value;
  int source;
  T result;
};

template <typename T>
T exchange(const char* name, uint32_t mask, T value, int source, Where where) {
  Exchange<T> mine = {value, source, value};
  warp_operation(
      name, mask, &mine,
      [](void* const lanes[32], uint32_t all) {
        for (int l = 0; l < 32; l++) {
          if (!(all >> l & 1)) continue;
          auto* to = static_cast<Exchange<T>*>(lanes[l]);
          if (!(all >> to->source & 1)) fail("lane %d reads lane %d, which is not in the mask %08x", l, to->source, all);
          to->result = static_cast<Exchange<T>*>(lanes[to->source])->value;
        }
      },
      where);
  return mine.result;
}

inline uint32_t ballot(const char* name, uint32_t mask, bool value, Where where) {
  Exchange<uint32_t> mine = {value, 0, 0};
  warp_operation(
      name, mask, &mine,
      [](void* const lanes[32], uint32_t all) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; l++)
          if (all >> l & 1 && static_cast<Exchange<uint32_t>*>(lanes[l])->value) votes |= 1u << l;
        for (int l = 0; l < 32; l++)
          if (all >> l & 1) static_cast<Exchange<uint32_t>*>(lanes[l])->result = votes;
      },
      where);
  return mine.result;
}

// The sums and maxima of groups of neighbouring lanes, in the order of a butterfly of shuffles.
template <int lanes, bool sum>
float butterfly(float value, Where where) {
  Exchange<float> mine = {value, 0, 0};
  warp_operation(
      sum ? "group_sum" : "group_max", 0xffffffffu, &mine,
      [](void* const all[32], uint32_t) {
        float x[32], next[32];
        for (int l = 0; l < 32; l++) x[l] = static_cast<Exchange<float>*>(all[l])->value;
        for (int d = lanes / 2; d > 0; d /= 2) {
          for (int l = 0; l < 32; l++) next[l] = sum ? x[l] + x[l ^ d] : std::fmax(x[l], x[l ^ d]);
          std::copy(next, next + 32, x);
        }
        for (int l = 0; l < 32; l++) static_cast<Exchange<float>*>(all[l])->result = x[l];
      },
      where);
  return mine.result;
}

template <typename T>
struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <typename T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
void multiply(void* const lanes[32], uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; l++) {
    const auto* lane = static_cast<const MmaLane<T>*>(lanes[l]);
    const int group = l / 4, k = l % 4 * 2;
    for (int e = 0; e < 2; e++) {
      for (int r = 0; r < 4; r++) a[group + 8 * (r & 1)][k + 8 * (r >> 1) + e] = half_of<T>(lane->a[r], e);
      for (int r = 0; r < 2; r++) b[k + 8 * r + e][group] = half_of<T>(lane->b[r], e);
      for (int r = 0; r < 2; r++) d[group + 8 * r][k + e] = lane->d[2 * r + e];
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < 4; e++)
      static_cast<MmaLane<T>*>(lanes[l])->d[e] = d[l / 4 + 8 * (e >> 1)][l % 4 * 2 + (e & 1)];
}

struct LoadLane {
  uint32_t* r;
  const void* row;
};
void load_matrices(const char* name, LoadLane lane, bool transposed, Where where);

}  // namespace simt

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::warp_operation("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {}, where);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  const int first = simt::lane() & ~(width - 1);
  return simt::exchange("__shfl_sync", mask, value, first | (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() ^ flip, end = (simt::lane() & ~(width - 1)) + width;
  return simt::exchange("__shfl_xor_sync", mask, value, source < end ? source : simt::lane(), where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() + by, end = (simt::lane() & ~(width - 1)) + width;
  return simt::exchange("__shfl_down_sync", mask, value, source < end ? source : simt::lane(), where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() - by, first = simt::lane() & ~(width - 1);
  return simt::exchange("__shfl_up_sync", mask, value, source >= first ? source : simt::lane(), where);
}
inline uint32_t __ballot_sync(uint32_t mask, int value, simt::Where where = simt::Where::current()) {
  return simt::ballot("__ballot_sync", mask, value != 0, where);
}
inline int __any_sync(uint32_t mask, int value, simt::Where where = simt::Where::current()) {
  return simt::ballot("__any_sync", mask, value != 0, where) != 0;
}
inline int __all_sync(uint32_t mask, int value, simt::Where where = simt::Where::current()) {
  return simt::ballot("__all_sync", mask, value != 0, where) == mask;
}

template <int lanes>
float group_sum(float x, simt::Where where = simt::Where::current()) {
  return simt::butterfly<lanes, true>(x, where);
}
template <int lanes>
float group_max(float x, simt::Where where = simt::Where::current()) {
  return simt::butterfly<lanes, false>(x, where);
}
inline float warp_sum(float x, simt::Where where = simt::Where::current()) { return group_sum<32>(x, where); }
inline float warp_max(float x, simt::Where where = simt::Where::current()) { return group_max<32>(x, where); }
inline float quad_sum(float x, simt::Where where = simt::Where::current()) { return group_sum<4>(x, where); }
inline float quad_max(float x, simt::Where where = simt::Where::current()) { return group_max<4>(x, where); }

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 simt::Where where = simt::Where::current()) {
  simt::MmaLane<T> mine = {d, a, b};
  simt::warp_operation("mma", 0xffffffffu, &mine, simt::multiply<T>, where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Where where = simt::Where::current()) {
  simt::load_matrices("ldmatrix", {r, row}, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, simt::Where where = simt::Where::current()) {
  simt::load_matrices("ldmatrix.trans", {r, row}, true, where);
}

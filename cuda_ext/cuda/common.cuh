// What several kernels share.
#pragma once

#include "kernels.cuh"
#include "simt/simt.cuh"

namespace aserve::cuda {

constexpr float kLog2e = 1.4426950408889634f;

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the element type that `dtype` names.
template <typename F>
int with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<bf16_t>{});
    case DType::f16:
      return f(Type<f16_t>{});
    default:
      return kUnsupported;
  }
}

__device__ __forceinline__ int64_t row_offset(const Rows& rows, int64_t row) {
  return row / rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride;
}

// `count` neighbouring elements, a power of two, read or written as one access of 8 or 16 bytes where they fill it.
template <typename T, int count>
struct alignas(sizeof(T) * count > 16 ? 16 : sizeof(T) * count) Pack {
  T at[count];
};

template <typename T, int count>
__device__ __forceinline__ Pack<T, count> load_pack(const T* p) {
  constexpr int bytes = sizeof(T) * count;
  if constexpr (bytes == 4 && count > 1) {
    return *reinterpret_cast<const Pack<T, count>*>(p);
  } else if constexpr (bytes >= 8 && count > 1) {
    union Both {
      Pack<T, count> pack;
      uint4 wide[(bytes + 15) / 16];
      uint2 narrow;
      __device__ Both() {}
    } both;
    if constexpr (bytes == 8) {
      both.narrow = load8(p);
    } else {
#pragma unroll
      for (int i = 0; i < bytes / 16; i++) both.wide[i] = load16(reinterpret_cast<const char*>(p) + 16 * i);
    }
    return both.pack;
  } else {
    Pack<T, count> pack;
#pragma unroll
    for (int i = 0; i < count; i++) pack.at[i] = p[i];
    return pack;
  }
}

template <typename T, int count>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, count>& pack) {
  constexpr int bytes = sizeof(T) * count;
  if constexpr (bytes == 4 && count > 1) {
    *reinterpret_cast<Pack<T, count>*>(p) = pack;
  } else if constexpr (bytes >= 8 && count > 1) {
    union Both {
      Pack<T, count> pack;
      uint4 wide[(bytes + 15) / 16];
      uint2 narrow;
      __device__ Both() {}
    } both;
    both.pack = pack;
    if constexpr (bytes == 8) {
      store8(p, both.narrow);
    } else {
#pragma unroll
      for (int i = 0; i < bytes / 16; i++) store16(reinterpret_cast<char*>(p) + 16 * i, both.wide[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; i++) p[i] = pack.at[i];
  }
}

// The sum over all threads of a block, for every thread.
__device__ __forceinline__ float block_sum(float x) {
  SHARED_ARRAY(float, sums, 32);
  const unsigned warps = blockDim.x / 32;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < warps ? sums[threadIdx.x % 32] : 0.0f;
  return warp_sum(x);
}

inline bool all_multiples(int64_t of) { return of > 0; }
template <typename... More>
bool all_multiples(int64_t of, int64_t first, More... more) {
  return first % of == 0 && all_multiples(of, more...);
}
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace aserve::cuda

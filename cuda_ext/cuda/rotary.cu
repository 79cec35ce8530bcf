// Rotary position embedding of queries and keys (Su et al. 2021), and keys and values into the paged cache.
//
// Every kind of scaling (linear, dynamic, YaRN, Llama 3, long) is in the table of cosines and sines.
// Floor: q, k, v read and q, cached k and v written once: 4 (Hq + 2 Hkv) D bytes a token in bf16. One token of an
// 8 B Llama: 25 kB. Even a prefill of 2048 is 50 MB, 17 us at 3.0 TB/s; decode is launch-bound.
#include "common.cuh"

namespace aserve::cuda {
namespace {

template <typename C, typename T>
__device__ __forceinline__ C to_cache(T x, float over) {
  if constexpr (sizeof(C) == 1) return from_float<C>(to_float(x) * over);
  else return from_float<C>(to_float(x));
}

template <typename T, typename C, int width>
__device__ __forceinline__ void store_cached(C* to, const Pack<T, width>& some, float over) {
  Pack<C, width> narrow;
#pragma unroll
  for (int e = 0; e < width; e++) narrow.at[e] = to_cache<C>(some.at[e], over);
  store_pack<C, width>(to, narrow);
}

template <typename T>
__device__ __forceinline__ void turn(T& first, T& second, float cos, float sin) {
  const float left = to_float(first), right = to_float(second);
  first = from_float<T>(left * cos - right * sin);
  second = from_float<T>(right * cos + left * sin);
}

// A block a token. Its threads share out pieces: of a head of q or k, `width` pairs to turn or `width` features
// to pass on; of a head of v, `width` features.
template <typename T, typename C, int width>
__global__ void __launch_bounds__(256) rotary_kernel(RotaryArgs a) {
  const int64_t token = blockIdx.x;
  const int half = static_cast<int>(a.rotary_size / 2), head_size = static_cast<int>(a.head_size);
  const int turned = half / width, whole = head_size / width;
  const int pieces = turned + (head_size - 2 * half) / width;  // of a head of q or k
  const int q_pieces = a.q_out == nullptr ? 0 : static_cast<int>(a.q_heads) * pieces;
  const int k_pieces = static_cast<int>(a.kv_heads) * pieces;
  const int v_pieces = a.v == nullptr ? 0 : static_cast<int>(a.kv_heads) * whole;
  const int64_t slot = a.v == nullptr ? -1 : a.slots[token];
  const int64_t cached = slot < 0 ? 0 : slot / a.block_size * a.cache_block + slot % a.block_size * a.cache_slot;
  const float* cos = half == 0 ? nullptr : a.cos_sin + a.positions[token] * a.rotary_size;
  const float k_over = 1.0f / a.k_scale, v_over = 1.0f / a.v_scale;

  for (int at = threadIdx.x; at < q_pieces + k_pieces + v_pieces; at += blockDim.x) {
    if (at >= q_pieces + k_pieces) {
      if (slot < 0) continue;
      const int head = (at - q_pieces - k_pieces) / whole, first = (at - q_pieces - k_pieces) % whole * width;
      const T* v = static_cast<const T*>(a.v) + token * a.v_stride + head * head_size + first;
      store_cached<T, C, width>(static_cast<C*>(a.v_cache) + cached + head * a.cache_head + first,
                                load_pack<T, width>(v), v_over);
      continue;
    }
    const bool of_q = at < q_pieces;
    const int head = (of_q ? at : at - q_pieces) / pieces, piece = (of_q ? at : at - q_pieces) % pieces;
    const T* x = (of_q ? static_cast<const T*>(a.q) + token * a.q_stride
                       : static_cast<const T*>(a.k) + token * a.k_stride) + head * head_size;
    T* out = of_q ? static_cast<T*>(a.q_out) + (token * a.q_heads + head) * head_size
                  : a.k_out == nullptr
                        ? nullptr
                        : static_cast<T*>(a.k_out) + (token * a.kv_heads + head) * head_size;
    C* cache = of_q || slot < 0 ? nullptr : static_cast<C*>(a.k_cache) + cached + head * a.cache_head;

    Pack<T, width> low, high;
    int low_at, high_at = -1;
    if (piece >= turned) {
      low_at = 2 * half + (piece - turned) * width;
      low = load_pack<T, width>(x + low_at);
    } else {
      low_at = a.interleaved ? 2 * piece * width : piece * width;
      high_at = a.interleaved ? low_at + width : half + low_at;
      low = load_pack<T, width>(x + low_at);
      high = load_pack<T, width>(x + high_at);
      const float* c = cos + piece * width;
      const float* s = c + half;
      // Which of two elements a pair is must be known when compiling, or the packs end up in local memory.
      if (a.interleaved) {
#pragma unroll
        for (int e = 0; e < width; e++) {
          constexpr int last = width - 1;
          if (2 * e + 1 < width) turn(low.at[2 * e & last], low.at[(2 * e + 1) & last], c[e], s[e]);
          else if (width == 1) turn(low.at[0], high.at[0], c[e], s[e]);
          else turn(high.at[2 * e & last], high.at[(2 * e + 1) & last], c[e], s[e]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < width; e++) turn(low.at[e], high.at[e], c[e], s[e]);
      }
    }
    if (out != nullptr) store_pack<T, width>(out + low_at, low);
    if (cache != nullptr) store_cached<T, C, width>(cache + low_at, low, k_over);
    if (high_at < 0) continue;
    if (out != nullptr) store_pack<T, width>(out + high_at, high);
    if (cache != nullptr) store_cached<T, C, width>(cache + high_at, high, k_over);
  }
}

template <typename T, typename C>
int launch_rotary(const RotaryArgs& a, void* stream) {
  constexpr int width = 16 / sizeof(T);
  bool wide = all_multiples(width, a.head_size, a.rotary_size / 2, a.k_stride) && aligned16(a.k) &&
              (a.k_out == nullptr || aligned16(a.k_out));
  if (a.q_out != nullptr) wide = wide && a.q_stride % width == 0 && aligned16(a.q) && aligned16(a.q_out);
  if (a.v != nullptr)
    wide = wide && all_multiples(width, a.v_stride, a.cache_block, a.cache_head, a.cache_slot) && aligned16(a.v) &&
           aligned16(a.k_cache) && aligned16(a.v_cache);
  const dim3 grid(static_cast<unsigned>(a.tokens)), block(256);
  if (wide) return launch(rotary_kernel<T, C, width>, grid, block, 0, stream, a);
  return launch(rotary_kernel<T, C, 1>, grid, block, 0, stream, a);
}

}  // namespace
}  // namespace aserve::cuda

ASERVE_LAUNCHER aserve_cuda_rotary(const aserve::cuda::RotaryArgs* args, void* stream) {
  using namespace aserve::cuda;
  const RotaryArgs& a = *args;
  if (a.rotary_size % 2 != 0 || a.rotary_size > a.head_size || a.head_size < 1) return kUnsupported;
  return with_float_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.cache_dtype == DType::e4m3) return launch_rotary<T, e4m3_t>(a, stream);
    if (a.cache_dtype == DType::e5m2) return launch_rotary<T, e5m2_t>(a, stream);
    return with_float_type(a.cache_dtype, [&](auto cached) {
      return launch_rotary<T, typename decltype(cached)::type>(a, stream);
    });
  });
}

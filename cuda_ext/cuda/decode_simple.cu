// Attention of few queries a row on the CUDA cores: any float type, head sizes of whole 8s up to 256.
//
// Floor: the keys and values of every row once, 2 * length * kv_heads * head_size elements. At `group` flops a
// byte (bf16) the CUDA cores keep up with memory to a group of about 4; larger groups go to decode_tensor.cu.
#include "attention.cuh"

namespace aserve::cuda {
namespace {

constexpr int kWarps = 4, kUnroll = 4;

template <typename C>
__device__ __forceinline__ void widen(const Pack<C, 8>& some, float (&value)[8], bool real) {
#pragma unroll
  for (int e = 0; e < 8; e++) value[e] = real ? to_float(some.at[e]) : 0.0f;
}

// A block serves `rows` pairs of one row and KV head, over one part of its keys. A lane holds 8 features of a
// head, so a warp reads 32 * 8 / bucket keys at a time, kUnroll of them ahead.
template <typename T, typename C, int bucket, int rows>
__global__ void __launch_bounds__(kWarps * 32) decode_simple_kernel(AttentionArgs a) {
  constexpr int lanes = bucket / 8, together = 32 / lanes, step = kWarps * together;
  DYNAMIC_SHARED(memory);
  const Sequence s(a, blockIdx.y, blockIdx.x % static_cast<int>(a.kv_heads));
  const int warp = threadIdx.x / 32, apart = threadIdx.x % 32 / lanes, feature = threadIdx.x % lanes * 8;
  const bool active = feature < a.head_size;
  const int stride = gridDim.x / static_cast<int>(a.kv_heads) * rows;

  for (int first_pair = blockIdx.x / static_cast<int>(a.kv_heads) * rows; first_pair < s.pairs;
       first_pair += stride) {
    float q[rows][8], sums[rows][8], maximum[rows], weight[rows], slope[rows];
    int position[rows];
#pragma unroll
    for (int r = 0; r < rows; r++) {
      const int pair = first_pair + r;
      position[r] = s.position(pair);
      maximum[r] = kNone;
      weight[r] = 0;
      slope[r] = pair < s.pairs ? slope_of(a, s.head(pair)) : 0.0f;
      Pack<T, 8> some;
      if (active && pair < s.pairs)
        some = load_pack<T, 8>(static_cast<const T*>(a.q) + s.query_offset(a, pair) + feature);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        q[r][e] = active && pair < s.pairs ? to_float(some.at[e]) : 0.0f;
        sums[r][e] = 0;
      }
    }
    Keys keys(a, s, first_pair, first_pair + rows - 1);
    keys.keep_part(blockIdx.z, gridDim.z);
    for (int base = keys.first + warp * together; base < keys.last; base += step * kUnroll) {
      Pack<C, 8> k[kUnroll], v[kUnroll];
      bool real[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        const int key = base + apart + u * step;
        real[u] = active && key < keys.last;
        if (real[u]) {
          const int64_t at = s.key_offset(a, key) + feature;
          k[u] = load_pack<C, 8>(static_cast<const C*>(a.k_cache) + at);
          v[u] = load_pack<C, 8>(static_cast<const C*>(a.v_cache) + at);
        }
      }
      float dots[kUnroll][rows], value[8];
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        widen(k[u], value, real[u]);
#pragma unroll
        for (int r = 0; r < rows; r++) {
          float dot = 0;
#pragma unroll
          for (int e = 0; e < 8; e++) dot += q[r][e] * value[e];
          dots[u][r] = group_sum<lanes>(dot);
        }
      }
      // A score takes its dot product's place, then the weight the score's.
#pragma unroll
      for (int r = 0; r < rows; r++) {
        float highest = maximum[r];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          const int key = base + apart + u * step;
          dots[u][r] = key < keys.last ? score(a, dots[u][r], slope[r], position[r], key) : kNone;
          highest = fmaxf(highest, dots[u][r]);
        }
        const float factor = correction(maximum[r], highest);
        weight[r] *= factor;
#pragma unroll
        for (int e = 0; e < 8; e++) sums[r][e] *= factor;
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          dots[u][r] = dots[u][r] == kNone ? 0.0f : exp2f(dots[u][r] - highest);
          weight[r] += dots[u][r];
        }
        maximum[r] = highest;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        widen(v[u], value, real[u]);
#pragma unroll
        for (int r = 0; r < rows; r++)
#pragma unroll
          for (int e = 0; e < 8; e++) sums[r][e] += dots[u][r] * value[e];
      }
    }
    float* state = reinterpret_cast<float*>(memory) + (warp * together + apart) * rows * (bucket + 2);
#pragma unroll
    for (int r = 0; r < rows; r++) {
#pragma unroll
      for (int e = 0; e < 8; e++) state[r * (bucket + 2) + feature + e] = sums[r][e];
      if (feature == 0) {
        state[r * (bucket + 2) + bucket] = maximum[r];
        state[r * (bucket + 2) + bucket + 1] = weight[r];
      }
    }
    __syncthreads();
    merge_states<T, step, rows, bucket>(a, s, first_pair, reinterpret_cast<const float*>(memory));
    __syncthreads();
  }
}

template <typename T, typename C, int bucket, int rows>
int launch_simple(const AttentionArgs& a, void* stream) {
  const int64_t tiles = ceil_div(a.max_query_len * (a.q_heads / a.kv_heads), rows);
  const dim3 grid(static_cast<unsigned>(a.kv_heads * tiles), static_cast<unsigned>(a.rows),
                  static_cast<unsigned>(a.splits));
  constexpr size_t states = kWarps * 32 / (bucket / 8);
  return launch(decode_simple_kernel<T, C, bucket, rows>, grid, dim3(kWarps * 32),
                states * rows * (bucket + 2) * sizeof(float), stream, a);
}

// A block a token and head.
template <typename T>
__global__ void __launch_bounds__(256) merge_kernel(AttentionArgs a) {
  const int64_t at = blockIdx.x, size = a.head_size;
  const float* partial = a.partial + at * a.splits * (size + 2);
  float maximum = kNone;
  for (int64_t i = 0; i < a.splits; i++) maximum = fmaxf(maximum, partial[i * (size + 2) + size]);
  for (int64_t feature = threadIdx.x; feature < size; feature += blockDim.x) {
    float sum = 0, weight = 0;
    for (int64_t i = 0; i < a.splits; i++) {
      const float* one = partial + i * (size + 2);
      const float factor = correction(one[size], maximum);
      sum += factor * one[feature];
      weight += factor * one[size + 1];
    }
    static_cast<T*>(a.out)[at * size + feature] = from_float<T>(weight == 0.0f ? 0.0f : sum / weight * a.v_scale);
  }
}

}  // namespace

int launch_merge(const AttentionArgs& a, void* stream) {
  if (a.splits <= 1) return 0;
  const dim3 grid(static_cast<unsigned>(a.tokens * a.q_heads));
  const dim3 block(static_cast<unsigned>(ceil_div(a.head_size, 32) * 32));
  return with_float_type(a.dtype, [&](auto type) {
    return launch(merge_kernel<typename decltype(type)::type>, grid, block, 0, stream, a);
  });
}

}  // namespace aserve::cuda

ASERVE_LAUNCHER aserve_cuda_decode_simple(const aserve::cuda::AttentionArgs* args, void* stream) {
  using namespace aserve::cuda;
  const AttentionArgs& a = *args;
  if (const int status = check_attention(a, 8); status != 0) return status;
  const bool single = a.q_heads == a.kv_heads && a.max_query_len == 1;
  const int status = with_float_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return with_cache_type<T>(a, [&](auto cache) {
      using C = typename decltype(cache)::type;
      return with_bucket(a, [&](auto bucket) {
        constexpr int size = decltype(bucket)::number;
        return single ? launch_simple<T, C, size, 1>(a, stream) : launch_simple<T, C, size, 4>(a, stream);
      });
    });
  });
  return status != 0 ? status : launch_merge(a, stream);
}

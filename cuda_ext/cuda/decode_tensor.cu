// Attention of few queries a row on the tensor cores: the query heads of a KV head fill the 16 rows of an mma.
//
// Floor: as in decode_simple.cu, the keys and values of every row once. 64 MB of them are 21 us at 3.0 TB/s.
// 16-bit queries, head sizes of whole 16s up to 256, the cache of the same type or 8-bit.
#include "attention_mma.cuh"

namespace aserve::cuda {
namespace {

constexpr int kWarps = 4, kKeys = 16;

template <typename T, typename C, int bucket>
struct DecodeShared {
  static constexpr bool narrow = sizeof(C) == 1;
  static constexpr size_t raw = 2 * 2 * kKeys * bucket * sizeof(C);               // a warp's: two stages of k and v
  static constexpr size_t wide = narrow ? 2 * kKeys * bucket * sizeof(T) : 0;     // a warp's
  static constexpr size_t queries = 16 * bucket * sizeof(T);
  static constexpr size_t bytes = queries + kWarps * (raw + wide);
  static_assert(bytes >= kWarps * 16 * (bucket + 2) * sizeof(float), "the warps' sums take the tiles' place");
};

// A block serves 16 pairs of one row and KV head over one part of its keys; its warps take 16 keys in turn, and
// meet at the end only.
template <typename T, typename C, int bucket>
__global__ void __launch_bounds__(kWarps * 32) decode_tensor_kernel(AttentionArgs a) {
  using Shared = DecodeShared<T, C, bucket>;
  DYNAMIC_SHARED(memory);
  const Sequence s(a, blockIdx.y, blockIdx.x % static_cast<int>(a.kv_heads));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const queries = reinterpret_cast<T*>(memory);
  unsigned char* const mine = memory + Shared::queries + warp * (Shared::raw + Shared::wide);
  C* const raw = reinterpret_cast<C*>(mine);
  T* const wide = reinterpret_cast<T*>(mine + Shared::raw);
  const int stride = gridDim.x / static_cast<int>(a.kv_heads) * 16;

  for (int first_pair = blockIdx.x / static_cast<int>(a.kv_heads) * 16; first_pair < s.pairs;
       first_pair += stride) {
    Keys keys(a, s, first_pair, first_pair + 15);
    keys.keep_part(blockIdx.z, gridDim.z);
    copy_queries<T, bucket, 16, kWarps * 32>(a, s, queries, first_pair);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    const auto fetch = [&](int key, int stage) {
      if (key < keys.last) {
        C* const k = raw + stage * 2 * kKeys * bucket;
        copy_keys<T, C, bucket, kKeys, 32>(a, s, a.k_cache, k, key, keys.last, lane);
        copy_keys<T, C, bucket, kKeys, 32>(a, s, a.v_cache, k + kKeys * bucket, key, keys.last, lane);
      }
      copy_async_commit();
    };
    WarpAttention<T, bucket> attention(a, s, first_pair);
    int stage = 0;
    fetch(keys.first + warp * kKeys, 0);
    for (int key = keys.first + warp * kKeys; key < keys.last; key += kWarps * kKeys, stage ^= 1) {
      fetch(key + kWarps * kKeys, stage ^ 1);
      copy_async_wait<1>();
      __syncwarp();
      const C* const k = raw + stage * 2 * kKeys * bucket;
      if constexpr (Shared::narrow) {
        widen_keys<T, C, bucket, 2 * kKeys, 32>(a, k, wide, lane);
        __syncwarp();
        attention.template attend<kKeys>(a, queries, 0, wide, wide + kKeys * bucket, key);
      } else {
        attention.template attend<kKeys>(a, queries, 0, k, k + kKeys * bucket, key);
      }
      __syncwarp();
    }
    attention.finish();
    copy_async_wait<0>();
    __syncthreads();

    // Keys from keys.last on were scored by nobody: the part's end is a row's end or a multiple of 64 behind its
    // beginning, and a warp's 16 keys never cross that.
    float* const state = reinterpret_cast<float*>(memory) + warp * 16 * (bucket + 2);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float* const row = state + (lane / 4 + 8 * h) * (bucket + 2);
#pragma unroll
      for (int n = 0; n < bucket / 8; n++) {
        row[n * 8 + lane % 4 * 2] = attention.sums[n][2 * h];
        row[n * 8 + lane % 4 * 2 + 1] = attention.sums[n][2 * h + 1];
      }
      if (lane % 4 == 0) {
        row[bucket] = attention.maximum[h];
        row[bucket + 1] = attention.weight[h];
      }
    }
    __syncthreads();
    merge_states<T, kWarps, 16, bucket>(a, s, first_pair, reinterpret_cast<const float*>(memory));
    __syncthreads();
  }
}

template <typename T, typename C, int bucket>
int launch_tensor(const AttentionArgs& a, void* stream) {
  const int64_t tiles = ceil_div(a.max_query_len * (a.q_heads / a.kv_heads), 16);
  const dim3 grid(static_cast<unsigned>(a.kv_heads * tiles), static_cast<unsigned>(a.rows),
                  static_cast<unsigned>(a.splits));
  return launch(decode_tensor_kernel<T, C, bucket>, grid, dim3(kWarps * 32), DecodeShared<T, C, bucket>::bytes,
                stream, a);
}

template <typename T>
int choose_tensor(const AttentionArgs& a, void* stream) {
  return with_cache_type<T>(a, [&](auto cache) {
    return with_bucket(a, [&](auto bucket) {
      return launch_tensor<T, typename decltype(cache)::type, decltype(bucket)::number>(a, stream);
    });
  });
}

}  // namespace
}  // namespace aserve::cuda

ASERVE_LAUNCHER aserve_cuda_decode_tensor(const aserve::cuda::AttentionArgs* args, void* stream) {
  using namespace aserve::cuda;
  const AttentionArgs& a = *args;
  if (const int status = check_mma(a); status != 0) return status;
  const int status = a.dtype == DType::bf16 ? choose_tensor<bf16_t>(a, stream) : choose_tensor<f16_t>(a, stream);
  return status != 0 ? status : launch_merge(a, stream);
}

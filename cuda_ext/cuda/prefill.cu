// Attention of many queries a row over its pages, cached prefix included, on the tensor cores.
//
// Floor: 4 * q_heads * head_size flops for every query and key it sees: a prefill of 2048 in an 8 B Llama, 32 heads
// of 128, is 34 GF a layer, 43 us at 798 TF; mma.sync reaches less than wgmma would.
// 16-bit queries, head sizes of whole 16s up to 256, the cache of the same type or 8-bit.
#include "attention_mma.cuh"

namespace aserve::cuda {
namespace {

constexpr int kWarps = 4, kPairs = 16 * kWarps, kThreads = 32 * kWarps;

template <typename T, typename C, int bucket>
struct PrefillShared {
  static constexpr bool narrow = sizeof(C) == 1;
  static constexpr int keys = bucket == 256 ? 32 : 64;
  static constexpr size_t queries = kPairs * bucket * sizeof(T);
  static constexpr size_t raw = 2 * 2 * keys * bucket * sizeof(C);  // two stages of k and v
  static constexpr size_t wide = narrow ? 2 * keys * bucket * sizeof(T) : 0;
  static constexpr size_t bytes = queries + raw + wide;
};

// The row and the tile in it of this block's number, or row -1 behind the last. The number of tiles a row has is
// known on the device only.
struct Place {
  int row = -1, tile = 0;
  __device__ explicit Place(const AttentionArgs& a) {
    const int group = static_cast<int>(a.q_heads / a.kv_heads), lane = threadIdx.x % 32;
    int left = static_cast<int>(blockIdx.x);
    for (int base = 0; base < a.rows; base += 32) {
      int tiles = 0;
      if (base + lane < a.rows)
        tiles = ((a.query_start[base + lane + 1] - a.query_start[base + lane]) * group + kPairs - 1) / kPairs;
      int through = tiles;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int before = __shfl_up_sync(kFullWarp, through, d);
        if (lane >= d) through += before;
      }
      const unsigned beyond = __ballot_sync(kFullWarp, left < through);
      if (beyond != 0) {
        const int found = __ffs(static_cast<int>(beyond)) - 1;
        row = base + found;
        tile = left - __shfl_sync(kFullWarp, through - tiles, found);
        return;
      }
      left -= __shfl_sync(kFullWarp, through, 31);
    }
  }
};

// A block serves 64 pairs of one row and KV head, a warp 16 of them, over all their keys.
template <typename T, typename C, int bucket>
__global__ void __launch_bounds__(kThreads) prefill_kernel(AttentionArgs a) {
  using Shared = PrefillShared<T, C, bucket>;
  constexpr int count = Shared::keys;
  DYNAMIC_SHARED(memory);
  const Place place(a);
  if (place.row < 0) return;
  const Sequence s(a, place.row, blockIdx.y);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_pair = place.tile * kPairs;
  T* const queries = reinterpret_cast<T*>(memory);
  C* const raw = reinterpret_cast<C*>(memory + Shared::queries);
  T* const wide = reinterpret_cast<T*>(memory + Shared::queries + Shared::raw);
  const Keys keys(a, s, first_pair, first_pair + kPairs - 1);

  const auto fetch = [&](int key, int stage) {
    if (key < keys.last) {
      C* const k = raw + stage * 2 * count * bucket;
      copy_keys<T, C, bucket, count, kThreads>(a, s, a.k_cache, k, key, keys.last, threadIdx.x);
      copy_keys<T, C, bucket, count, kThreads>(a, s, a.v_cache, k + count * bucket, key, keys.last, threadIdx.x);
    }
    copy_async_commit();
  };
  copy_queries<T, bucket, kPairs, kThreads>(a, s, queries, first_pair);
  fetch(keys.first, 0);
  WarpAttention<T, bucket> attention(a, s, first_pair + warp * 16);
  int stage = 0;
  for (int key = keys.first; key < keys.last; key += count, stage ^= 1) {
    fetch(key + count, stage ^ 1);
    copy_async_wait<1>();
    __syncthreads();
    const C* const k = raw + stage * 2 * count * bucket;
    if constexpr (Shared::narrow) {
      widen_keys<T, C, bucket, 2 * count, kThreads>(a, k, wide, threadIdx.x);
      __syncthreads();
      attention.template attend<count>(a, queries, warp * 16, wide, wide + count * bucket, key);
    } else {
      attention.template attend<count>(a, queries, warp * 16, k, k + count * bucket, key);
    }
    __syncthreads();
  }
  attention.finish();

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int pair = first_pair + warp * 16 + lane / 4 + 8 * h;
    if (pair >= s.pairs) continue;
    const float factor = attention.weight[h] == 0.0f ? 0.0f : a.v_scale / attention.weight[h];
    T* const out = static_cast<T*>(a.out) +
                   (static_cast<int64_t>(s.token(pair)) * a.q_heads + s.head(pair)) * a.head_size + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < bucket / 8; n++) {
      if (n * 8 >= a.head_size) break;
      Pack<T, 2> both;
      both.at[0] = from_float<T>(attention.sums[n][2 * h] * factor);
      both.at[1] = from_float<T>(attention.sums[n][2 * h + 1] * factor);
      store_pack<T, 2>(out + n * 8, both);
    }
  }
}

template <typename T, typename C, int bucket>
int launch_prefill(const AttentionArgs& a, void* stream) {
  // At most one tile of each row is not full.
  const int64_t tiles = ceil_div(a.tokens * (a.q_heads / a.kv_heads), kPairs) + a.rows;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.kv_heads));
  return launch(prefill_kernel<T, C, bucket>, grid, dim3(kThreads), PrefillShared<T, C, bucket>::bytes, stream, a);
}

template <typename T>
int choose_prefill(const AttentionArgs& a, void* stream) {
  return with_cache_type<T>(a, [&](auto cache) {
    return with_bucket(a, [&](auto bucket) {
      return launch_prefill<T, typename decltype(cache)::type, decltype(bucket)::number>(a, stream);
    });
  });
}

}  // namespace
}  // namespace aserve::cuda

ASERVE_LAUNCHER aserve_cuda_prefill(const aserve::cuda::AttentionArgs* args, void* stream) {
  using namespace aserve::cuda;
  const AttentionArgs& a = *args;
  if (const int status = check_mma(a); status != 0) return status;
  if (a.splits != 1 || a.kv_heads > 65535) return kUnsupported;
  return a.dtype == DType::bf16 ? choose_prefill<bf16_t>(a, stream) : choose_prefill<f16_t>(a, stream);
}

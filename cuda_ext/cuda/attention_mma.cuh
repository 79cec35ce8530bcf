// Attention of 16 pairs by one warp on the tensor cores, and its tiles in shared memory (Dao 2023, FlashAttention-2).
//
// A tile's row holds `bucket` 16-bit elements in chunks of 8; chunk c of row r lies at c ^ (r % 8), so that the 8
// rows ldmatrix reads together lie in different banks. An 8-bit cache is copied as it is into a raw tile first.
#pragma once

#include "attention.cuh"

namespace aserve::cuda {

template <int bucket>
__device__ __forceinline__ int tile_at(int row, int chunk) {
  return row * bucket + ((chunk ^ (row & 7)) << 3);
}

// Begins to copy keys first .. first + keys - 1 of one side of the cache; those from `last` on become zeros.
// `thread` of `threads` does its share.
template <typename T, typename C, int bucket, int keys, int threads>
__device__ __forceinline__ void copy_keys(const AttentionArgs& a, const Sequence& s, const void* side, C* tile,
                                          int first, int last, int thread) {
  constexpr int per_chunk = 16 / sizeof(C);
  const int chunks = static_cast<int>(a.head_size) / per_chunk;
  for (int i = thread; i < keys * chunks; i += threads) {
    const int row = i / chunks, chunk = i % chunks, key = first + row;
    const bool real = key < last;
    const C* from = static_cast<const C*>(side);
    if (real) from += s.key_offset(a, key) + chunk * per_chunk;
    C* to = sizeof(C) == 2 ? tile + tile_at<bucket>(row, chunk) : tile + row * bucket + chunk * per_chunk;
    copy_async16(to, from, real);
  }
}

template <typename T, typename C, int bucket, int keys, int threads>
__device__ __forceinline__ void widen_keys(const AttentionArgs& a, const C* raw, T* tile, int thread) {
  const int chunks = static_cast<int>(a.head_size) / 8;
  for (int i = thread; i < keys * chunks; i += threads) {
    const int row = i / chunks, chunk = i % chunks;
    const auto narrow = load_pack<C, 8>(raw + row * bucket + chunk * 8);
    Pack<T, 8> wide;
#pragma unroll
    for (int e = 0; e < 8; e++) wide.at[e] = from_float<T>(to_float(narrow.at[e]));
    store_pack<T, 8>(tile + tile_at<bucket>(row, chunk), wide);
  }
}

// Begins to copy the queries of pairs first .. first + count - 1; zeros where there are none.
template <typename T, int bucket, int count, int threads>
__device__ __forceinline__ void copy_queries(const AttentionArgs& a, const Sequence& s, T* tile, int first) {
  const int chunks = static_cast<int>(a.head_size) / 8;
  for (int i = threadIdx.x; i < count * chunks; i += threads) {
    const int row = i / chunks, chunk = i % chunks, pair = first + row;
    const bool real = pair < s.pairs;
    const T* from = static_cast<const T*>(a.q);
    if (real) from += s.query_offset(a, pair) + chunk * 8;
    copy_async16(tile + tile_at<bucket>(row, chunk), from, real);
  }
}

// What a warp knows of 16 pairs. A lane has rows lane / 4 and lane / 4 + 8, of every 8 columns lane % 4 * 2 and the
// next.
template <typename T, int bucket>
struct WarpAttention {
  float sums[bucket / 8][4];
  float maximum[2], weight[2], slope[2];
  int position[2];

  __device__ __forceinline__ WarpAttention(const AttentionArgs& a, const Sequence& s, int first_pair) {
#pragma unroll
    for (int n = 0; n < bucket / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[n][e] = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int pair = first_pair + threadIdx.x % 32 / 4 + 8 * h;
      position[h] = s.position(pair);
      slope[h] = pair < s.pairs ? slope_of(a, s.head(pair)) : 0.0f;
      maximum[h] = kNone;
      weight[h] = 0;
    }
  }

  // q: the tile's 16 rows from row `q_row`; k, v: tiles of `keys` rows, the first of them key `first`.
  template <int keys>
  __device__ __forceinline__ void attend(const AttentionArgs& a, const T* q, int q_row, const T* k, const T* v,
                                         int first) {
    const int lane = threadIdx.x % 32, size = static_cast<int>(a.head_size);
    float scores[keys / 8][4];
#pragma unroll
    for (int n = 0; n < keys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) scores[n][e] = 0;
#pragma unroll
    for (int d = 0; d < bucket / 16; d++) {
      if (d * 16 >= size) break;
      uint32_t left[4];
      ldmatrix_x4(left, q + tile_at<bucket>(q_row + lane % 16, d * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < keys / 16; n++) {
        uint32_t right[4];
        ldmatrix_x4(right, k + tile_at<bucket>(n * 16 + lane % 8 + lane / 16 * 8, d * 2 + lane / 8 % 2));
        const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
        mma_16x8x16<T>(scores[2 * n], left, low);
        mma_16x8x16<T>(scores[2 * n + 1], left, high);
      }
    }
    float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < keys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = first + n * 8 + lane % 4 * 2 + e % 2;
        scores[n][e] = score(a, scores[n][e], slope[e / 2], position[e / 2], key);
        highest[e / 2] = fmaxf(highest[e / 2], scores[n][e]);
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      highest[h] = quad_max(highest[h]);
      const float factor = correction(maximum[h], highest[h]);
      maximum[h] = highest[h];
      weight[h] *= factor;
#pragma unroll
      for (int n = 0; n < bucket / 8; n++) {
        sums[n][2 * h] *= factor;
        sums[n][2 * h + 1] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < keys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        scores[n][e] = scores[n][e] == kNone ? 0.0f : exp2f(scores[n][e] - maximum[e / 2]);
        weight[e / 2] += scores[n][e];
      }
#pragma unroll
    for (int n = 0; n < keys / 16; n++) {
      const uint32_t left[4] = {pack2<T>(scores[2 * n][0], scores[2 * n][1]),
                                pack2<T>(scores[2 * n][2], scores[2 * n][3]),
                                pack2<T>(scores[2 * n + 1][0], scores[2 * n + 1][1]),
                                pack2<T>(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < bucket / 16; d++) {
        if (d * 16 >= size) break;
        uint32_t right[4];
        ldmatrix_x4_trans(right, v + tile_at<bucket>(n * 16 + lane % 16, d * 2 + lane / 16));
        const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
        mma_16x8x16<T>(sums[2 * d], left, low);
        mma_16x8x16<T>(sums[2 * d + 1], left, high);
      }
    }
  }

  // Each lane has summed the weights of its own columns alone.
  __device__ __forceinline__ void finish() {
    weight[0] = quad_sum(weight[0]);
    weight[1] = quad_sum(weight[1]);
  }
};

inline int check_mma(const AttentionArgs& a) {
  if (a.dtype != DType::bf16 && a.dtype != DType::f16) return kUnsupported;
  return check_attention(a, 16);
}

}  // namespace aserve::cuda

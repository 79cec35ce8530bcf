// What the attention kernels share: whose keys a query sees, where they lie, how a score is made, the merge.
//
// The pairs of a row are its queries times the query heads of one KV head, query by query: pair p is query
// p / group of head p % group. Every key read serves all pairs of a block.
#pragma once

#include "common.cuh"

namespace aserve::cuda {

constexpr float kNone = -INFINITY;

// One row of the step as a block sees it.
struct Sequence {
  const int32_t* table;
  int start, queries, length, group, pairs, kv_head, shift;

  __device__ Sequence(const AttentionArgs& a, int row, int kv_head_) : kv_head(kv_head_) {
    table = a.block_tables + row * a.table_stride;
    start = a.query_start[row];
    queries = a.query_start[row + 1] - start;
    length = a.seq_lens[row];
    group = static_cast<int>(a.q_heads / a.kv_heads);
    pairs = queries * group;
    shift = __ffs(static_cast<int>(a.block_size)) - 1;
  }
  __device__ __forceinline__ int token(int pair) const { return start + pair / group; }
  __device__ __forceinline__ int head(int pair) const { return kv_head * group + pair % group; }
  // Of a pair's query in its sequence; before every key where there is no such pair.
  __device__ __forceinline__ int position(int pair) const {
    return pair < pairs ? length - queries + pair / group : -1;
  }
  __device__ __forceinline__ int64_t key_offset(const AttentionArgs& a, int key) const {
    const int in_block = key & ((1 << shift) - 1);
    return table[key >> shift] * a.cache_block + kv_head * a.cache_head + in_block * a.cache_slot;
  }
  __device__ __forceinline__ int64_t query_offset(const AttentionArgs& a, int pair) const {
    return token(pair) * a.q_token + head(pair) * a.q_head;
  }
};

// Keys first .. last - 1, all that pairs from..to (inclusive) can see.
struct Keys {
  int first, last;
  __device__ Keys(const AttentionArgs& a, const Sequence& s, int from, int to) {
    to = to < s.pairs ? to : s.pairs - 1;
    last = s.position(to) + 1;
    const int window = static_cast<int>(a.window);
    first = window > 0 && s.position(from) >= window ? s.position(from) - window + 1 : 0;
  }
  // The part of one of several blocks: the same count for all, a multiple of 64, so the last ones may be empty.
  __device__ void keep_part(int part, int parts) {
    const int each = ((last - first + parts - 1) / parts + 63) / 64 * 64;
    first += part * each;
    last = first + each < last ? first + each : last;
  }
};

// A score in powers of two, or kNone where `query` does not see `key`.
__device__ __forceinline__ float score(const AttentionArgs& a, float dot, float slope, int query, int key) {
  if (key > query || (a.window > 0 && query - key >= a.window)) return kNone;
  float value = dot * a.scale * a.k_scale;
  if (a.softcap != 0.0f) value = a.softcap * tanhf(value / a.softcap);
  return (value - slope * static_cast<float>(query - key)) * kLog2e;
}

__device__ __forceinline__ float slope_of(const AttentionArgs& a, int head) {
  return a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[head];
}

// What an old sum is worth under a new maximum.
__device__ __forceinline__ float correction(float old_max, float new_max) {
  return old_max == kNone ? 0.0f : exp2f(old_max - new_max);
}

// One feature of a result: into the output, or into this split's partial sums.
template <typename T>
__device__ __forceinline__ void write_feature(const AttentionArgs& a, int token, int head, int feature, float sum,
                                              float maximum, float weight) {
  const int64_t at = static_cast<int64_t>(token) * a.q_heads + head;
  if (a.splits <= 1) {
    static_cast<T*>(a.out)[at * a.head_size + feature] =
        from_float<T>(weight == 0.0f ? 0.0f : sum / weight * a.v_scale);
    return;
  }
  float* partial = a.partial + (at * a.splits + blockIdx.z) * (a.head_size + 2);
  partial[feature] = sum;
  if (feature == 0) {
    partial[a.head_size] = maximum;
    partial[a.head_size + 1] = weight;
  }
}

// Sums of the warps or groups of a block, `state` floats [states][rows][width + 2], to the output. Block-wide.
template <typename T, int states, int rows, int width>
__device__ __forceinline__ void merge_states(const AttentionArgs& a, const Sequence& s, int first_pair,
                                             const float* state) {
  const int size = static_cast<int>(a.head_size);
  for (int i = threadIdx.x; i < rows * size; i += blockDim.x) {
    const int r = i / size, feature = i % size, pair = first_pair + r;
    if (pair >= s.pairs) continue;
    const float* mine = state + r * (width + 2);
    float maximum = kNone, sum = 0, weight = 0;
    for (int j = 0; j < states; j++) maximum = fmaxf(maximum, mine[j * rows * (width + 2) + width]);
    for (int j = 0; j < states; j++) {
      const float* one = mine + j * rows * (width + 2);
      const float factor = correction(one[width], maximum);
      sum += factor * one[feature];
      weight += factor * one[width + 1];
    }
    write_feature<T>(a, s.token(pair), s.head(pair), feature, sum, maximum, weight);
  }
}

// 0, or why a kernel cannot serve these arguments.
inline int check_attention(const AttentionArgs& a, int64_t multiple) {
  const bool fits = a.head_size >= multiple && a.head_size <= 256 && a.head_size % multiple == 0 &&
                    a.kv_heads >= 1 && a.q_heads % a.kv_heads == 0 && a.block_size >= 1 &&
                    (a.block_size & (a.block_size - 1)) == 0 && a.splits >= 1 && a.splits <= 65535 &&
                    (a.splits == 1 || a.partial != nullptr) && a.window >= 0 && a.window < 1 << 30 &&
                    a.rows <= 65535 && a.max_query_len >= 1;
  // 16-byte accesses; 8 bytes of an 8-bit cache.
  const bool aligned = aligned16(a.q) && aligned16(a.k_cache) && aligned16(a.v_cache) &&
                       all_multiples(8, a.q_token, a.q_head) &&
                       all_multiples(multiple, a.cache_block, a.cache_head, a.cache_slot);
  return fits && aligned ? 0 : kUnsupported;
}

// Calls f(Type<cache type>{}) for the caches that queries of type T may have.
template <typename T, typename F>
int with_cache_type(const AttentionArgs& a, F&& f) {
  if (a.cache_dtype == a.dtype) return f(Type<T>{});
  if constexpr (sizeof(T) == 2) {
    if (a.cache_dtype == DType::e4m3) return f(Type<e4m3_t>{});
    if (a.cache_dtype == DType::e5m2) return f(Type<e5m2_t>{});
  }
  return kUnsupported;
}

template <int value>
struct Number {
  static constexpr int number = value;
};

// Calls f(Number<b>{}) for the least of the sizes 64, 128, 256 that holds a head.
template <typename F>
int with_bucket(const AttentionArgs& a, F&& f) {
  if (a.head_size <= 64) return f(Number<64>{});
  if (a.head_size <= 128) return f(Number<128>{});
  return f(Number<256>{});
}

// Follows a decode kernel that ran with splits.
int launch_merge(const AttentionArgs& a, void* stream);

}  // namespace aserve::cuda

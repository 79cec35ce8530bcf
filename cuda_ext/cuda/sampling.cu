// From logits to tokens where neither top-k nor top-p is asked for: penalties, temperature, the draw.
//
// A draw is the greatest of logit / temperature + Gumbel noise (Gumbel 1954), so that one pass over the logits
// finds it. The noise is SplitMix64 (Steele, Lea & Flood 2014) of seed, position and token, so a row draws the
// same in every batch. Floor: the logits once; 64 rows of 128k in float32 are 33 MB, 11 us at 3.0 TB/s.
#include "common.cuh"

namespace aserve::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(256) penalty_kernel(PenaltyArgs a) {
  const int64_t row = blockIdx.x;
  T* const logits = static_cast<T*>(a.logits) + row * a.stride;
  const float repetition = a.repetition[row], frequency = a.frequency[row], presence = a.presence[row];
  for (int64_t i = a.starts[row] + threadIdx.x; i < a.starts[row + 1]; i += blockDim.x) {
    T& logit = logits[a.ids[i]];
    const int count = a.counts[i];
    float value = to_float(logit);
    value = value > 0.0f ? value / repetition : value * repetition;
    value -= frequency * static_cast<float>(count);
    if (count > 0) value -= presence;
    logit = from_float<T>(value);
  }
}

__device__ __forceinline__ uint64_t scramble(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// From (0, 1), never its ends: 23 bits and a half, which float32 holds exactly.
__device__ __forceinline__ float gumbel(uint64_t stream, int64_t token) {
  const uint64_t bits = scramble(stream + (static_cast<uint64_t>(token) + 1) * 0x9e3779b97f4a7c15ull) >> 41;
  const float uniform = (static_cast<float>(bits) + 0.5f) * 0x1p-23f;
  return -logf(-logf(uniform));
}

// The best key so far and the sum of exp(x - maximum).
struct Best {
  float key = -INFINITY, value = -INFINITY, maximum = -INFINITY, sum = 0;
  int64_t token = INT64_MAX;

  // The lesser token of equal keys.
  __device__ __forceinline__ void offer(float other_key, float other_value, int64_t other) {
    if (other_key > key || (other_key == key && other < token)) {
      key = other_key;
      value = other_value;
      token = other;
    }
  }
  __device__ __forceinline__ void add(float other_maximum, float other_sum) {
    const float highest = fmaxf(maximum, other_maximum);
    if (highest == -INFINITY) {
      sum += other_sum;  // zero, or NaN
      return;
    }
    sum = sum * expf(maximum - highest) + other_sum * expf(other_maximum - highest);
    maximum = highest;
  }
  __device__ __forceinline__ void across_warp() {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      const float other_key = __shfl_xor_sync(kFullWarp, key, d), other_value = __shfl_xor_sync(kFullWarp, value, d);
      const long long other = __shfl_xor_sync(kFullWarp, static_cast<long long>(token), d);
      const float other_maximum = __shfl_xor_sync(kFullWarp, maximum, d);
      const float other_sum = __shfl_xor_sync(kFullWarp, sum, d);
      offer(other_key, other_value, other);
      add(other_maximum, other_sum);
    }
  }
};

// A token takes two floats: its bits, not its value.
__device__ __forceinline__ void write_partial(float* to, const Best& best) {
  to[0] = best.key;
  to[1] = best.value;
  to[2] = best.maximum;
  to[3] = best.sum;
  int32_t* const bits = reinterpret_cast<int32_t*>(to);
  bits[4] = static_cast<int32_t>(best.token & 0xffffffff);
  bits[5] = static_cast<int32_t>(best.token >> 32);
}

template <typename T>
__global__ void __launch_bounds__(256) sample_kernel(SampleArgs a) {
  SHARED_ARRAY(float, partial, 8 * kSamplePartial);
  const int64_t row = blockIdx.x, each = (a.size + a.parts - 1) / a.parts, first = blockIdx.y * each;
  const int64_t last = first + each < a.size ? first + each : a.size;
  const T* const logits = static_cast<const T*>(a.logits) + row * a.stride;
  const float temperature = a.temperature == nullptr ? 0.0f : a.temperature[row];
  const bool greedy = temperature == 0.0f;
  const float over = greedy ? 1.0f : 1.0f / temperature;
  uint64_t stream = 0;
  if (!greedy)
    stream = scramble(scramble(static_cast<uint64_t>(a.seeds[row])) + static_cast<uint64_t>(a.positions[row]));
  Best best;
  for (int64_t token = first + threadIdx.x; token < last; token += blockDim.x) {
    const float value = to_float(logits[token]) * over;
    // No noise lifts a token that is ruled out.
    best.offer(greedy || value == -INFINITY ? value : value + gumbel(stream, token), value, token);
    best.add(value, value != value ? value : value == -INFINITY ? 0.0f : 1.0f);
  }
  best.across_warp();
  if (threadIdx.x % 32 == 0) write_partial(partial + threadIdx.x / 32 * kSamplePartial, best);
  __syncthreads();
  float* const out = a.partial + (row * a.parts + blockIdx.y) * kSamplePartial;
  // The warps' results stay apart until the next kernel has them all.
  if (threadIdx.x != 0) return;
  Best all;
  for (int w = 0; w < 8; w++) {
    const float* from = partial + w * kSamplePartial;
    const int32_t* bits = reinterpret_cast<const int32_t*>(from);
    all.offer(from[0], from[1], static_cast<int64_t>(bits[5]) << 32 | static_cast<uint32_t>(bits[4]));
    all.add(from[2], from[3]);
  }
  write_partial(out, all);
}

// A warp a row.
__global__ void __launch_bounds__(32) choose_kernel(SampleArgs a) {
  const int64_t row = blockIdx.x;
  Best best;
  for (int64_t part = threadIdx.x; part < a.parts; part += 32) {
    const float* from = a.partial + (row * a.parts + part) * kSamplePartial;
    const int32_t* bits = reinterpret_cast<const int32_t*>(from);
    best.offer(from[0], from[1], static_cast<int64_t>(bits[5]) << 32 | static_cast<uint32_t>(bits[4]));
    best.add(from[2], from[3]);
  }
  best.across_warp();
  if (threadIdx.x != 0) return;
  // Where every logit is NaN there is no best; the log-probability says so.
  a.token[row] = best.token == INT64_MAX ? 0 : best.token;
  a.logprob[row] = best.value - best.maximum - logf(best.sum);
}

}  // namespace
}  // namespace aserve::cuda

ASERVE_LAUNCHER aserve_cuda_penalties(const aserve::cuda::PenaltyArgs* args, void* stream) {
  using namespace aserve::cuda;
  const PenaltyArgs& a = *args;
  return with_float_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(penalty_kernel<T>, dim3(static_cast<unsigned>(a.rows)), dim3(256), 0, stream, a);
  });
}

ASERVE_LAUNCHER aserve_cuda_sample(const aserve::cuda::SampleArgs* args, void* stream) {
  using namespace aserve::cuda;
  const SampleArgs& a = *args;
  if (a.size < 1 || a.parts < 1 || a.parts > 65535) return kUnsupported;
  const dim3 rows(static_cast<unsigned>(a.rows)), grid(rows.x, static_cast<unsigned>(a.parts));
  const int status = with_float_type(a.dtype, [&](auto type) {
    return launch(sample_kernel<typename decltype(type)::type>, grid, dim3(256), 0, stream, a);
  });
  return status != 0 ? status : launch(choose_kernel, rows, dim3(32), 0, stream, a);
}

// Kernels with one mistake each, for the tests of the emulation; and kernels that show one operation each.
#include "common.cuh"

namespace {

// Neighbours swap values through shared memory.
template <bool barrier>
__global__ void swap_kernel(float* out, const float* in) {
  SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// The buffer is used twice, and only sometimes with a barrier before it is overwritten.
template <bool barrier>
__global__ void reuse_kernel(float* out, const float* in) {
  SHARED_ARRAY(float, values, 64);
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    values[threadIdx.x] = in[threadIdx.x] + i;
    __syncthreads();
    sum += values[63 - threadIdx.x];
    if (barrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void unreachable_kernel(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void different_barriers_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void divergent_shuffle_kernel(float* out) {
  float x = 1;
  if (threadIdx.x % 32 < 7) x = __shfl_xor_sync(kFullWarp, x, 1);
  else x = __shfl_sync(kFullWarp, x, 0);
  out[threadIdx.x] = x;
}

__global__ void lost_lane_kernel(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = warp_sum(1.0f);
}

__global__ void barrier_and_shuffle_kernel(float* out) {
  if (threadIdx.x == 3) __syncthreads();
  else out[threadIdx.x] = warp_sum(1.0f);
}

__global__ void mask_kernel(float* out) {
  if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xffu, threadIdx.x * 1.0f, 9);
}

__global__ void gather_kernel(float* out, const float* cache, const int* table, int block_floats) {
  out[threadIdx.x] = cache[static_cast<int64_t>(table[threadIdx.x]) * block_floats + threadIdx.x];
}

__global__ void behind_kernel(unsigned char* out, int at) {
  if (threadIdx.x == 0) out[at] = 1;
}

__global__ void misaligned_kernel(uint4* out, const char* in) { out[threadIdx.x] = load16(in + 8); }

__global__ void shared_overrun_kernel(int where) {
  DYNAMIC_SHARED(memory);
  SHARED_ARRAY(char, some, 20);
  some[0] = 0;
  if (where == 0) memory[gridDim.x * 100] = 1;
  else some[gridDim.x * 20] = 1;
}

// Bytes through shared memory by asynchronous copies; with `wait` 0 nobody waits for them.
__global__ void async_kernel(uint4* out, const char* in, int wait) {
  DYNAMIC_SHARED(memory);
  unsigned char* mine = memory + 16 * threadIdx.x;
  copy_async16(mine, in + 16 * threadIdx.x, threadIdx.x % 3 != 0);
  copy_async_commit();
  if (wait) copy_async_wait<0>();
  out[threadIdx.x] = load16(mine);
  copy_async_wait<0>();
}

__global__ void forgotten_copy_kernel(const char* in) {
  DYNAMIC_SHARED(memory);
  copy_async16(memory + 16 * threadIdx.x, in + 16 * threadIdx.x, true);
  copy_async_commit();
}

__global__ void recursion_kernel(float* out) {
  volatile char big[400 << 10];
  big[threadIdx.x] = 1;
  out[threadIdx.x] = big[threadIdx.x];
}

__global__ void warp_kernel(int* out, int* counters) {
  const int lane = threadIdx.x % 32;
  int* mine = out + 8 * threadIdx.x;
  mine[0] = __shfl_sync(kFullWarp, lane * 3, lane / 2);
  mine[1] = __shfl_xor_sync(kFullWarp, lane, 5);
  mine[2] = __shfl_down_sync(kFullWarp, lane, 3);
  mine[3] = __shfl_up_sync(kFullWarp, lane, 3, 8);
  mine[4] = static_cast<int>(__ballot_sync(kFullWarp, lane % 3 == 0));
  mine[5] = static_cast<int>(group_sum<8>(static_cast<float>(lane)));
  mine[6] = static_cast<int>(quad_max(static_cast<float>(lane)));
  // The halves of a warp may meet apart.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  mine[7] = lane < 16 ? __shfl_xor_sync(half, lane, 1) : __shfl_xor_sync(half, lane, 2);
  atomicAdd(&counters[0], 1);
  atomicMax(&counters[1], static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

// c = a b by one warp: a 16 x 16 by rows, b 16 x 8 given as 8 x 16 or, `transposed`, as 16 x 8 padded to 16 columns.
template <typename T>
__global__ void mma_kernel(float* c, const T* a, const T* b, int transposed) {
  SHARED_ARRAY(T, left, 256);
  SHARED_ARRAY(T, right, 256);
  const int lane = threadIdx.x;
  for (int i = lane; i < 32; i += 32) {
    store16(left + 8 * i, load16(a + 8 * i));
    store16(right + 8 * i, load16(b + 8 * i));
  }
  __syncwarp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, left + (lane % 16) * 16 + lane / 16 * 8);
  // Matrices of b: k 0-7 and 8-15 of columns 0-7, then of columns 8-15, which are not used.
  if (transposed) ldmatrix_x4_trans(fb, right + (lane % 16) * 16 + lane / 16 * 8);
  else ldmatrix_x4(fb, right + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  float d[4] = {0, 0, 0, 0};
  const uint32_t low[2] = {fb[0], fb[1]};
  mma_16x8x16<T>(d, fa, low);
  for (int e = 0; e < 4; e++) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

template <typename T>
__global__ void convert_kernel(float* wide, T* narrow, const T* codes, const float* values, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    wide[i] = to_float(codes[i]);
    narrow[i] = from_float<T>(values[i]);
  }
}

template <typename T>
int convert(float* wide, void* narrow, const void* codes, const float* values, int count) {
  return launch(convert_kernel<T>, dim3(1), dim3(32), 0, nullptr, wide, static_cast<T*>(narrow),
                static_cast<const T*>(codes), values, count);
}

}  // namespace

#define CALL(name, block, dynamic, ...) \
  return launch(name, dim3(1), dim3(block), dynamic, nullptr, __VA_ARGS__)

ASERVE_LAUNCHER fault_swap(float* out, const float* in, int barrier) {
  if (barrier) CALL(swap_kernel<true>, 64, 0, out, in);
  CALL(swap_kernel<false>, 64, 0, out, in);
}
ASERVE_LAUNCHER fault_reuse(float* out, const float* in, int barrier) {
  if (barrier) CALL(reuse_kernel<true>, 64, 0, out, in);
  CALL(reuse_kernel<false>, 64, 0, out, in);
}
ASERVE_LAUNCHER fault_unreachable(float* out) { CALL(unreachable_kernel, 64, 0, out); }
ASERVE_LAUNCHER fault_different_barriers(float* out) { CALL(different_barriers_kernel, 64, 0, out); }
ASERVE_LAUNCHER fault_divergent_shuffle(float* out) { CALL(divergent_shuffle_kernel, 32, 0, out); }
ASERVE_LAUNCHER fault_lost_lane(float* out) { CALL(lost_lane_kernel, 32, 0, out); }
ASERVE_LAUNCHER fault_barrier_and_shuffle(float* out) { CALL(barrier_and_shuffle_kernel, 32, 0, out); }
ASERVE_LAUNCHER fault_mask(float* out) { CALL(mask_kernel, 32, 0, out); }
ASERVE_LAUNCHER fault_gather(float* out, const float* cache, const int* table, int block_floats) {
  CALL(gather_kernel, 32, 0, out, cache, table, block_floats);
}
ASERVE_LAUNCHER fault_behind(unsigned char* out, int at) { CALL(behind_kernel, 32, 0, out, at); }
ASERVE_LAUNCHER fault_misaligned(void* out, const char* in) {
  CALL(misaligned_kernel, 32, 0, static_cast<uint4*>(out), in);
}
ASERVE_LAUNCHER fault_shared_overrun(int where) { CALL(shared_overrun_kernel, 32, 100, where); }
ASERVE_LAUNCHER fault_async(void* out, const char* in, int wait) {
  CALL(async_kernel, 64, 1024, static_cast<uint4*>(out), in, wait);
}
ASERVE_LAUNCHER fault_forgotten_copy(const char* in) { CALL(forgotten_copy_kernel, 32, 512, in); }
ASERVE_LAUNCHER fault_stack(float* out) { CALL(recursion_kernel, 32, 0, out); }
ASERVE_LAUNCHER fault_launch(float* out, int threads, int dynamic) {
  CALL(unreachable_kernel, threads, dynamic, out);
}
ASERVE_LAUNCHER show_warp(int* out, int* counters) {
  return launch(warp_kernel, dim3(2), dim3(64), 0, nullptr, out, counters);
}
ASERVE_LAUNCHER show_mma(float* c, const void* a, const void* b, int f16, int transposed) {
  if (f16) CALL(mma_kernel<f16_t>, 32, 0, c, static_cast<const f16_t*>(a), static_cast<const f16_t*>(b), transposed);
  CALL(mma_kernel<bf16_t>, 32, 0, c, static_cast<const bf16_t*>(a), static_cast<const bf16_t*>(b), transposed);
}
ASERVE_LAUNCHER show_convert(float* wide, void* narrow, const void* codes, const float* values, int count, int type) {
  switch (type) {
    case 1:
      return convert<bf16_t>(wide, narrow, codes, values, count);
    case 2:
      return convert<f16_t>(wide, narrow, codes, values, count);
    case 3:
      return convert<e4m3_t>(wide, narrow, codes, values, count);
    default:
      return convert<e5m2_t>(wide, narrow, codes, values, count);
  }
}
// Sizes of the argument structures, for the callers that write them in another language.
ASERVE_LAUNCHER show_size(int which) {
  using namespace aserve::cuda;
  const size_t sizes[] = {sizeof(NormArgs),    sizeof(GatedArgs), sizeof(RotaryArgs), sizeof(AttentionArgs),
                          sizeof(CopyArgs),    sizeof(PenaltyArgs), sizeof(SampleArgs)};
  return static_cast<int>(sizes[which]);
}

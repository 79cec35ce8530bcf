// What a kernel includes. Under nvcc it is CUDA and a few instructions that CUDA C++ has no name for. Under any
// other C++20 compiler it is an emulation of both on the CPU, in which a test runs the very same source.
//
// Beside CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync, atomicAdd ...) a kernel uses:
//   f16_t bf16_t e4m3_t e5m2_t, to_float(x), from_float<T>(x), pack2<T>(low, high)
//   SHARED_ARRAY(T, name, count)   a static array in shared memory
//   DYNAMIC_SHARED(name)           the launch's dynamic shared memory, unsigned char*, 128-byte aligned
//   load16 / load8 / store16 / store8    one access of 16 or 8 bytes, aligned to its size
//   mma_16x8x16, ldmatrix_x4, ldmatrix_x4_trans, copy_async16, copy_async_commit, copy_async_wait<N>
//   warp_sum, warp_max, quad_sum, quad_max, group_sum<lanes>
//   launch(kernel, grid, block, dynamic_bytes, stream, arguments...)    0, or an error's number
//
// The emulation knows no memory model between blocks, no clusters, TMA or wgmma, and no timing.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "device.cuh"
#else
#include "host_types.cuh"
#include "host_threads.cuh"
#include "host_warp.cuh"
#include "host_memory.cuh"
#endif

constexpr unsigned kFullWarp = 0xffffffffu;

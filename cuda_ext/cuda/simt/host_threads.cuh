// The emulation's threads. Each CUDA thread of a block is a fiber; a block runs on the calling thread, and so do
// the blocks of a grid, one after another. A fiber runs until it must wait for others.
//
// A mistake ends the launch with status kFault and a sentence in simt_error(): a barrier or warp operation that
// some threads never reach, an access outside every buffer, a bad alignment, an impossible launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>
#include <utility>

#include "host_types.cuh"

namespace simt {

using Where = std::source_location;
constexpr int kFault = 1;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxDynamic = 227 * 1024, kMaxStatic = 48 * 1024;

enum class Order : int { forward = 0, reverse = 1, random = 2 };
enum class Waits : uint8_t { ready, barrier, warp, done };
using Combine = void (*)(void* const lanes[32], uint32_t mask);

struct Fiber {
  void* stack_pointer;
  dim3 index;
  int id;
  Waits waits;
  // Of the warp operation it waits in:
  const char* operation;
  uint32_t mask;
  void* lane;
  // Of the barrier or operation it waits in:
  Where where;
};

// What a kernel can see of the launch. One launch runs at a time.
struct Now {
  Fiber* fiber = nullptr;
  dim3 block_index, block_size, grid_size;
  unsigned char* dynamic = nullptr;
};
extern Now now;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void block_barrier(Where where);
void warp_operation(const char* name, uint32_t mask, void* lane, Combine combine, Where where);
// Shared memory of one static array, told apart by `key`; the same for all threads of a block.
void* static_shared(const void* key, size_t bytes);
int run(dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*), void* argument);

inline int lane() { return now.fiber->id & 31; }

template <typename T, size_t count, typename Key>
T* static_array(Key) {
  static char key = 0;
  return static_cast<T*>(static_shared(&key, count * sizeof(T)));
}

}  // namespace simt

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (simt::now.fiber->index)
#define blockIdx (simt::now.block_index)
#define blockDim (simt::now.block_size)
#define gridDim (simt::now.grid_size)
#define SHARED_ARRAY(T, name, count) T* const name = simt::static_array<T, (count)>([] {})
#define DYNAMIC_SHARED(name) unsigned char* const name = simt::now.dynamic

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::block_barrier(where); }
inline void __threadfence() {}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, void*,
           Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  // Copied once, as a launch copies its parameters.
  std::tuple<void (*)(Parameters...), Parameters...> call(kernel, static_cast<Parameters>(arguments)...);
  auto body = [](void* given) {
    std::apply([](auto function, auto&... each) { function(each...); }, *static_cast<decltype(call)*>(given));
  };
  return simt::run(grid, block, dynamic_bytes, body, &call);
}

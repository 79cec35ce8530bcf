// Whole cache blocks copied: inside the caches, and between them and pinned host memory.
//
// One launch serves every layer. Pinned host memory has a device address, so a swap is the same kernel, and needs
// no copy call a block and layer. Floor: 2 bytes moved per byte inside the device, the link's rate for a swap.
#include "common.cuh"

namespace aserve::cuda {
namespace {

template <typename Unit>
__global__ void __launch_bounds__(256) copy_kernel(CopyArgs a) {
  const int64_t pair = blockIdx.x, side = blockIdx.y, units = a.block_bytes / sizeof(Unit);
  const char* source = reinterpret_cast<const char*>(a.sources[side]) + a.pairs[2 * pair] * a.source_stride;
  char* target = reinterpret_cast<char*>(a.targets[side]) + a.pairs[2 * pair + 1] * a.target_stride;
  if (source == target) return;
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) {
    if constexpr (sizeof(Unit) == 16) store16(target + 16 * i, load16(source + 16 * i));
    else target[i] = source[i];
  }
}

}  // namespace
}  // namespace aserve::cuda

// Addresses are read on the device, so the caller's word counts that 16 divides them where it divides the strides.
ASERVE_LAUNCHER aserve_cuda_copy_blocks(const aserve::cuda::CopyArgs* args, void* stream) {
  using namespace aserve::cuda;
  const CopyArgs& a = *args;
  if (a.sides > 65535) return kUnsupported;
  const dim3 grid(static_cast<unsigned>(a.count), static_cast<unsigned>(a.sides));
  if (all_multiples(16, a.block_bytes, a.source_stride, a.target_stride))
    return launch(copy_kernel<uint4>, grid, dim3(256), 0, stream, a);
  return launch(copy_kernel<char>, grid, dim3(256), 0, stream, a);
}

// Whole-block copies. Built for the baseline CPU: memcpy chooses its own instructions.
#include <cstring>

#include "kernels.h"

namespace aserve {

Status copy_blocks(const CopyArgs& a) {
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t from = a.pairs[2 * i], to = a.pairs[2 * i + 1];
    if (from < 0 || to < 0 || from >= a.num_blocks || to >= a.num_blocks) return Status::bad_block;
  }
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t from = a.pairs[2 * i], to = a.pairs[2 * i + 1];
    if (from == to) continue;
    std::memcpy(static_cast<char*>(a.cache) + to * a.block_stride, static_cast<char*>(a.cache) + from * a.block_stride,
                static_cast<size_t>(a.block_bytes));
  }
  return Status::ok;
}

}  // namespace aserve

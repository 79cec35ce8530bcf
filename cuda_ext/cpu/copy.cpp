// Whole-block copies. Built for the baseline CPU: memcpy chooses its own instructions.
#include <cstring>

#include "kernels.h"

namespace aserve {

Status copy_blocks(const CopyArgs& a) {
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t from = a.pairs[2 * i], to = a.pairs[2 * i + 1];
    if (from < 0 || to < 0 || from >= a.source_blocks || to >= a.target_blocks) return Status::bad_block;
  }
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t from = a.pairs[2 * i], to = a.pairs[2 * i + 1];
    char* target = static_cast<char*>(a.target) + to * a.target_stride;
    const char* source = static_cast<const char*>(a.source) + from * a.source_stride;
    if (target != source) std::memcpy(target, source, static_cast<size_t>(a.block_bytes));
  }
  return Status::ok;
}

}  // namespace aserve

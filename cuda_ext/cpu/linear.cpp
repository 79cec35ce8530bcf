// Sizes of packed weights, and the packing of dense ones. Built for the baseline CPU.
#include "linear.h"

#include <cstring>

#include "quant.h"

namespace aserve {
namespace {

size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t columns_of_line(Format format) { return format == Format::f32 ? 1 : 2; }

}  // namespace

bool known_format(int64_t format) {
  return (format >= 0 && format <= static_cast<int64_t>(Format::f16)) ||
         (format >= static_cast<int64_t>(Format::q4_0) && format <= static_cast<int64_t>(Format::q6_k));
}

int64_t column_multiple(Format format) { return is_dense(format) ? 1 : quant_layout(format).file_columns; }

size_t group_bytes(Format format, int64_t columns) {
  if (!is_dense(format)) return quant_group_bytes(format, columns);
  const int64_t p = columns_of_line(format);
  return static_cast<size_t>((columns + p - 1) / p) * 64;
}

size_t ready_bytes(Format format, int64_t columns) {
  if (!is_dense(format)) return quant_ready_bytes(columns);
  const size_t bytes = whole_lines(static_cast<size_t>(columns) * sizeof(float));
  // Rows a large power of two apart would share a few cache sets.
  return bytes % 1024 == 0 ? bytes + 64 : bytes;
}

size_t scratch_bytes(Format format, int64_t columns) {
  return is_dense(format) ? 0 : quant_scratch_bytes(format, columns);
}

void pack_dense(Format format, const void* weight, int64_t rows, int64_t columns, uint8_t* out) {
  const size_t element = format == Format::f32 ? 4 : 2, group = group_bytes(format, columns);
  const int64_t p = columns_of_line(format), groups = (rows + kGroup - 1) / kGroup;
  std::memset(out, 0, static_cast<size_t>(groups) * group);
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t* from = static_cast<const uint8_t*>(weight) + static_cast<size_t>(row * columns) * element;
    uint8_t* to = out + static_cast<size_t>(row / kGroup) * group;
    const int64_t lane = row % kGroup;
    for (int64_t k = 0; k < columns; k++) {
      const int64_t place = format == Format::bf16 ? 2 * lane + k % 2 : k % p * kGroup + lane;
      std::memcpy(to + k / p * 64 + place * static_cast<int64_t>(element), from + static_cast<size_t>(k) * element,
                  element);
    }
  }
}

}  // namespace aserve

// What every binding needs besides tensors: the kernels in use, threads to run them, errors.
#pragma once

#include "cpu/kernels.h"
#include "cpu/team.h"
#include "tensor_view.h"

namespace {

using aserve::Status;

inline aserve::Threads threads() {
  uint32_t count = 1;
  if (torch_get_num_threads(&count) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("aserve: torch_get_num_threads failed");
  return {static_cast<int>(count), aserve::team_workers};
}

inline const aserve::Kernels& table(const char* op) {
  const aserve::Kernels* kernels = aserve::kernels();
  if (kernels == nullptr) refuse(op, "this CPU has neither AVX-512 nor AVX2");
  return *kernels;
}

inline void check(const char* op, Status status) {
  switch (status) {
    case Status::ok:
      return;
    case Status::bad_block:
      refuse(op, "a block id is outside the cache");
    case Status::bad_slot:
      refuse(op, "a slot is outside the cache");
    case Status::bad_position:
      refuse(op, "a position is outside cos_sin");
    case Status::bad_row:
      refuse(op, "an id is outside the table");
    case Status::bad_type:
      refuse(op, "on the CPU the logits must be float32");
    case Status::no_memory:
      refuse(op, "out of memory");
  }
}

inline void set_type(const View& x, DType& type) { type = x.storage(); }
inline void set_cache_type(const View& x, DType& type) { type = x.storage(); }

// Refuses rows, once they are read, that are not those of so many tokens or do not fit their block tables.
template <typename Args>
void check_rows(const char* op, const Args& a, int64_t tokens, int64_t block_size) {
  if (a.query_start[0] != 0 || a.query_start[a.rows] != tokens)
    refuse(op, "query_start must run from 0 to the number of tokens, ", tokens);
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t count = static_cast<int64_t>(a.query_start[row + 1]) - a.query_start[row];
    if (count < 0) refuse(op, "query_start falls at row ", row);
    if (a.seq_lens[row] < count) refuse(op, "row ", row, " has more tokens than its sequence");
    if (a.seq_lens[row] > a.max_blocks * block_size) refuse(op, "row ", row, " is longer than its block table");
  }
}

inline aserve::Format format_of(const char* op, int64_t format) {
  if (!aserve::known_format(format)) refuse(op, "unknown format ", format);
  return static_cast<aserve::Format>(format);
}

// Refuses data that is not the packed bytes of such a matrix.
inline void check_packed(const View& data, aserve::Format format, int64_t rows, int64_t columns) {
  if (rows < 0 || columns < 1) refuse(data.op, "a matrix of ", rows, " by ", columns, " cannot be packed");
  const int64_t multiple = aserve::column_multiple(format);
  if (columns % multiple != 0) refuse(data.op, "this format's columns come in ", multiple, "s, there are ", columns);
  const int64_t groups = (rows + aserve::kGroup - 1) / aserve::kGroup;
  const int64_t bytes = groups * static_cast<int64_t>(aserve::group_bytes(format, columns));
  data.rank(1).typed(aoti_torch_dtype_uint8(), "uint8").dense_from(0).size(0, bytes);
  if (reinterpret_cast<uintptr_t>(data.data) % 64 != 0) refuse(data.op, data.name, " must be 64-byte aligned");
}

inline aserve::PackedWeight packed_weight(const View& data, int64_t format, int64_t rows, int64_t columns) {
  aserve::PackedWeight weight = {format_of(data.op, format), rows, columns, static_cast<const uint8_t*>(data.data),
                                 nullptr};
  check_packed(data, weight.format, rows, columns);
  return weight;
}

}  // namespace

#include "arguments.h"

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
    case Status::no_memory:
      refuse(op, "out of memory");
  }
}

// The cache's layout into args that name it cache_block, cache_head, cache_slot, block_size, num_blocks.
template <typename Args>
void read_cache(const View& k, const View& v, int64_t kv_heads, int64_t head_size, Args& a) {
  k.rank(4).size(1, kv_heads).size(3, head_size).dense_from(3);
  same_shape(k, v);
  check_same_type(k, v);
  for (int64_t d = 0; d < 4; d++)
    if (k.strides[d] != v.strides[d]) refuse(k.op, "k_cache and v_cache must have one layout");
  a.num_blocks = k.sizes[0];
  a.block_size = k.sizes[2];
  if (a.block_size < 1) refuse(k.op, "the block size must be positive");
  a.cache_block = k.strides[0];
  a.cache_head = k.strides[1];
  a.cache_slot = k.strides[2];
  a.cache_dtype = k.storage();
}

// The rows of a step into args that name them rows, query_start, seq_lens, block_tables, max_blocks and
// table_stride; tokens: of all rows.
template <typename Args>
void read_rows(const View& query_start, const View& seq_lens, const View& block_tables, int64_t tokens,
               int64_t block_size, Args& a) {
  const char* op = query_start.op;
  const int32_t int32 = aoti_torch_dtype_int32();
  a.rows = seq_lens.rank(1).sizes[0];
  seq_lens.typed(int32, "int32").dense_from(0);
  query_start.rank(1).size(0, a.rows + 1).typed(int32, "int32").dense_from(0);
  block_tables.rank(2).size(0, a.rows).typed(int32, "int32").dense_from(1);
  a.query_start = static_cast<const int32_t*>(query_start.data);
  a.seq_lens = static_cast<const int32_t*>(seq_lens.data);
  a.block_tables = static_cast<const int32_t*>(block_tables.data);
  a.max_blocks = block_tables.sizes[1];
  a.table_stride = block_tables.strides[0];
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

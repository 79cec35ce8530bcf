// Tensors of an operation, checked and read into a kernel's arguments: the CPU kernels' and the CUDA ones', which
// name them alike. Only what can be told without reading a tensor's values is checked here.
//
// A binding declares before this is included, for its own DType:
//   void set_type(const View&, DType&), of float32, bfloat16 or float16;
//   void set_cache_type(const View&, DType&), of a cache.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "tensor_view.h"

namespace {

inline const int64_t* int64s(const View& x, int64_t count) {
  x.rank(1).size(0, count).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  return static_cast<const int64_t*>(x.data);
}

inline const int32_t* int32s(const View& x, int64_t count) {
  x.rank(1).size(0, count).typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
  return static_cast<const int32_t*>(x.data);
}

inline const float* floats(const View& x, int64_t count) {
  x.rank(1).size(0, count).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  return static_cast<const float*>(x.data);
}

template <typename Rows>
void set_rows(const View& x, Rows& to) {
  const aserve::Rows rows = rows_of(x);
  to = {rows.count, rows.inner, rows.inner_stride, rows.outer_stride};
}

template <typename Args>
Args norm_args(const View& x, const View* residual, const View& weight, double eps, const View& out,
               const View* total) {
  Args a = {};
  set_rows(x, a.x_rows);
  a.size = x.sizes[x.dims - 1];
  weight.rank(1).size(0, a.size).dense_from(0);
  same_shape(x, out);
  out.dense_from(0);
  check_same_type(x, out);
  if (residual != nullptr) {
    same_shape(x, *residual);
    same_shape(x, *total);
    total->dense_from(0);
    check_same_type(x, *residual);
    check_same_type(x, *total);
    set_rows(*residual, a.residual_rows);
    a.residual = residual->data;
    a.total = total->data;
  }
  a.x = x.data;
  a.weight = weight.data;
  a.out = out.data;
  a.eps = static_cast<float>(eps);
  set_type(x, a.dtype);
  set_type(weight, a.weight_dtype);
  return a;
}

template <typename Args>
Args gated_args(const View& x, int64_t activation, const View& out) {
  Args a = {};
  set_rows(x, a.x_rows);
  a.size = x.sizes[x.dims - 1] / 2;
  if (2 * a.size != x.sizes[x.dims - 1]) refuse(x.op, "the last dimension of x must be even");
  out.rank(x.dims).size(x.dims - 1, a.size).dense_from(0);
  for (int64_t d = 0; d + 1 < x.dims; d++) out.size(d, x.sizes[d]);
  check_same_type(x, out);
  if (activation < 0 || activation > 2) refuse(x.op, "unknown activation ", activation);
  a.x = x.data;
  a.out = out.data;
  set_type(x, a.dtype);
  return a;
}

// The caches' layout into args that name it cache_block, cache_head, cache_slot and block_size.
template <typename Args>
void read_cache(const View& k, const View& v, int64_t kv_heads, int64_t head_size, double k_scale, double v_scale,
                Args& a) {
  k.rank(4).size(1, kv_heads).size(3, head_size).dense_from(3);
  same_shape(k, v);
  check_same_type(k, v);
  for (int64_t d = 0; d < 4; d++)
    if (k.strides[d] != v.strides[d]) refuse(k.op, "k_cache and v_cache must have one layout");
  a.block_size = k.sizes[2];
  if (a.block_size < 1) refuse(k.op, "the block size must be positive");
  a.cache_block = k.strides[0];
  a.cache_head = k.strides[1];
  a.cache_slot = k.strides[2];
  set_cache_type(k, a.cache_dtype);
  for (const double scale : {k_scale, v_scale}) {
    if (!(scale > 0) || !std::isfinite(scale)) refuse(k.op, "a cache's scale must be positive, is ", scale);
    if (scale != 1 && !k.narrow()) refuse(k.op, "only an 8-bit cache has scales other than 1");
  }
  if constexpr (requires { a.num_blocks; }) a.num_blocks = k.sizes[0];
  if constexpr (requires { a.k_scale; }) {
    a.k_scale = static_cast<float>(k_scale);
    a.v_scale = static_cast<float>(v_scale);
  }
}

// The rows of a step into args that name them rows, query_start, seq_lens, block_tables and table_stride.
template <typename Args>
void read_rows(const View& query_start, const View& seq_lens, const View& block_tables, Args& a) {
  a.rows = seq_lens.rank(1).sizes[0];
  a.seq_lens = int32s(seq_lens, a.rows);
  a.query_start = int32s(query_start, a.rows + 1);
  block_tables.rank(2).size(0, a.rows).typed(aoti_torch_dtype_int32(), "int32").dense_from(1);
  a.block_tables = static_cast<const int32_t*>(block_tables.data);
  a.table_stride = block_tables.strides[0];
  if constexpr (requires { a.max_blocks; }) a.max_blocks = block_tables.sizes[1];
}

template <typename Args>
Args rotary_args(const View& q, const View& k, const View& positions, const View& cos_sin, bool interleaved,
                 const View& q_out) {
  Args a = {};
  q.rank(3).dense_from(1);
  k.rank(3).dense_from(1).size(0, q.sizes[0]).size(2, q.sizes[2]);
  check_same_type(q, k);
  check_same_type(q, q_out);
  cos_sin.rank(2).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  same_shape(q, q_out);
  q_out.dense_from(0);
  a.tokens = q.sizes[0];
  a.q_heads = q.sizes[1];
  a.kv_heads = k.sizes[1];
  a.head_size = q.sizes[2];
  a.rotary_size = cos_sin.sizes[1];
  if (a.rotary_size % 2 != 0 || a.rotary_size > a.head_size)
    refuse(q.op, "cos_sin must have an even number of columns, at most ", a.head_size);
  if constexpr (requires { a.max_position; }) a.max_position = cos_sin.sizes[0];
  a.q = q.data;
  a.k = k.data;
  a.q_out = q_out.data;
  a.positions = int64s(positions, a.tokens);
  a.cos_sin = static_cast<const float*>(cos_sin.data);
  a.q_stride = q.strides[0];
  a.k_stride = k.strides[0];
  a.interleaved = interleaved;
  set_type(q, a.dtype);
  a.cache_dtype = a.dtype;
  if constexpr (requires { a.k_scale; }) a.k_scale = a.v_scale = 1.0f;
  return a;
}

template <typename Args>
void read_k_out(const View& k, const View& k_out, Args& a) {
  same_shape(k, k_out);
  check_same_type(k, k_out);
  k_out.dense_from(0);
  a.k_out = k_out.data;
}

// Keys and values and where in the cache they go.
template <typename Args>
void read_stored(const View& k, const View& v, const View& k_cache, const View& v_cache, const View& slots,
                 double k_scale, double v_scale, Args& a) {
  k.rank(3).dense_from(1);
  same_shape(k, v);
  check_same_type(k, v);
  v.dense_from(1);
  a.tokens = k.sizes[0];
  a.kv_heads = k.sizes[1];
  a.head_size = k.sizes[2];
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, k_scale, v_scale, a);
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.k = k.data;
  a.v = v.data;
  a.k_stride = k.strides[0];
  a.v_stride = v.strides[0];
  a.slots = int64s(slots, a.tokens);
  set_type(k, a.dtype);
}

template <typename Args>
Args attention_args(const View& q, const View& k_cache, const View& v_cache, const View& query_start,
                    const View& seq_lens, const View& block_tables, double scale, int64_t window, double softcap,
                    const std::optional<View>& slopes, double k_scale, double v_scale, int64_t max_query_len,
                    const View& out) {
  const char* op = q.op;
  Args a = {};
  q.rank(3).dense_from(2);
  k_cache.rank(4);
  a.q_heads = q.sizes[1];
  a.kv_heads = k_cache.sizes[1];
  a.head_size = q.sizes[2];
  if (a.kv_heads < 1 || a.q_heads % a.kv_heads != 0)
    refuse(op, a.q_heads, " query heads do not divide among ", a.kv_heads, " KV heads");
  if (a.head_size < 8 || a.head_size > 256 || a.head_size % 8 != 0)
    refuse(op, "the head size must be a multiple of 8 from 8 to 256, is ", a.head_size);
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, k_scale, v_scale, a);
  same_shape(q, out);
  out.dense_from(0);
  check_same_type(q, out);
  read_rows(query_start, seq_lens, block_tables, a);
  if (slopes.has_value()) a.alibi_slopes = floats(*slopes, a.q_heads);
  if (window < 0) refuse(op, "window must not be negative");
  if (max_query_len < 0) refuse(op, "max_query_len must not be negative");
  a.q = q.data;
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.out = out.data;
  a.q_token = q.strides[0];
  a.q_head = q.strides[1];
  a.window = window;
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  set_type(q, a.dtype);
  return a;
}

// Logits, and the token and log-probability of each of their rows.
template <typename Args>
Args drawn_args(const View& logits, const View& token, const View& logprob) {
  Args a = {};
  logits.rank(2).dense_from(1);
  a.rows = logits.sizes[0];
  a.size = logits.sizes[1];
  if (a.size < 1) refuse(logits.op, "logits must have a column");
  a.logits = logits.data;
  a.token = const_cast<int64_t*>(int64s(token, a.rows));
  a.logprob = const_cast<float*>(floats(logprob, a.rows));
  a.stride = logits.strides[0];
  set_type(logits, a.dtype);
  return a;
}

template <typename Args>
void read_draw(const View& temperature, const View& seeds, const View& positions, Args& a) {
  a.temperature = floats(temperature, a.rows);
  a.seeds = int64s(seeds, a.rows);
  a.positions = int64s(positions, a.rows);
}

template <typename Args>
Args penalty_args(const View& logits, const View& starts, const View& ids, const View& counts,
                  const View& repetition, const View& frequency, const View& presence) {
  Args a = {};
  logits.rank(2).dense_from(1);
  a.rows = logits.sizes[0];
  a.size = logits.sizes[1];
  a.stride = logits.strides[0];
  a.logits = logits.data;
  a.starts = int64s(starts, a.rows + 1);
  ids.rank(1);
  a.ids = int64s(ids, ids.sizes[0]);
  a.counts = int32s(counts, ids.sizes[0]);
  a.repetition = floats(repetition, a.rows);
  a.frequency = floats(frequency, a.rows);
  a.presence = floats(presence, a.rows);
  set_type(logits, a.dtype);
  return a;
}

// Whole blocks to be copied, all of one size: side i of the sources to side i of the targets.
struct Blocks {
  int64_t source_stride = 0, target_stride = 0, block_bytes = 0, source_blocks = 0, target_blocks = 0;
};

inline Blocks block_layout(const View& source, const View& target) {
  Blocks b;
  if (source.dims < 2) refuse(source.op, source.name, " must have blocks of at least one dimension");
  source.dense_from(1);
  target.rank(source.dims).dense_from(1);
  check_same_type(source, target);
  b.block_bytes = source.element_bytes();
  b.source_stride = source.strides[0] * b.block_bytes;
  b.target_stride = target.strides[0] * b.block_bytes;
  b.source_blocks = source.sizes[0];
  b.target_blocks = target.sizes[0];
  for (int64_t d = 1; d < source.dims; d++) {
    target.size(d, source.sizes[d]);
    b.block_bytes *= source.sizes[d];
  }
  return b;
}

// Source and target of each pair.
inline const int64_t* pair_data(const View& pairs) {
  pairs.rank(2).size(1, 2).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  return static_cast<const int64_t*>(pairs.data);
}

inline void check_sides(const char* op, size_t sources, size_t targets) {
  if (sources != targets) refuse(op, sources, " sources and ", targets, " targets");
}

}  // namespace

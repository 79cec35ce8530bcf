// Binding of the CPU kernels to torch's stable ABI: checks shapes, dtypes, strides and devices, then
// hands pointers to the kernels. Outputs are made by the caller, so that every op only writes into
// tensors it is given.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "binding.h"

namespace {

void norm(const char* op, const Tensor& x_, const Tensor* residual_, const Tensor& weight_, double eps,
          const Tensor& out_, const Tensor* total_) {
  const View x(op, "x", x_), weight(op, "weight", weight_), out(op, "out", out_);
  aserve::NormArgs a = {};
  a.x_rows = rows_of(x);
  a.size = x.sizes[x.dims - 1];
  weight.rank(1).size(0, a.size).dense_from(0);
  same_shape(x, out);
  out.dense_from(0);
  check_same_type(x, out);
  if (residual_ != nullptr) {
    const View residual(op, "residual", *residual_), total(op, "total", *total_);
    same_shape(x, residual);
    same_shape(x, total);
    total.dense_from(0);
    check_same_type(x, residual);
    check_same_type(x, total);
    a.residual_rows = rows_of(residual);
    a.residual = residual.data;
    a.total = total.data;
  }
  a.x = x.data;
  a.weight = weight.data;
  a.out = out.data;
  a.eps = static_cast<float>(eps);
  a.dtype = x.storage();
  a.weight_dtype = weight.storage();
  table(op).norm(a, threads());
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  norm("rms_norm", x, nullptr, weight, eps, out, nullptr);
}

void fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                        const Tensor& out, const Tensor& total) {
  norm("fused_add_rms_norm", x, &residual, weight, eps, out, &total);
}

aserve::RotaryArgs rotary_args(const View& q, const View& k, const View& positions, const View& cos_sin,
                               bool interleaved, const View& q_out) {
  aserve::RotaryArgs a = {};
  q.rank(3).dense_from(1);
  k.rank(3).dense_from(1).size(0, q.sizes[0]).size(2, q.sizes[2]);
  check_same_type(q, k);
  check_same_type(q, q_out);
  positions.rank(1).size(0, q.sizes[0]).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  cos_sin.rank(2).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  same_shape(q, q_out);
  q_out.dense_from(0);
  a.tokens = q.sizes[0];
  a.q_heads = q.sizes[1];
  a.kv_heads = k.sizes[1];
  a.head_size = q.sizes[2];
  a.max_position = cos_sin.sizes[0];
  a.rotary_size = cos_sin.sizes[1];
  if (a.rotary_size % 2 != 0 || a.rotary_size > a.head_size)
    refuse(q.op, "cos_sin must have an even number of columns, at most ", a.head_size);
  a.q = q.data;
  a.k = k.data;
  a.q_out = q_out.data;
  a.positions = static_cast<const int64_t*>(positions.data);
  a.cos_sin = static_cast<const float*>(cos_sin.data);
  a.q_stride = q.strides[0];
  a.k_stride = k.strides[0];
  a.interleaved = interleaved;
  a.dtype = q.storage();
  a.cache_dtype = a.dtype;
  return a;
}

void rotary_embedding(const Tensor& q_, const Tensor& k_, const Tensor& positions_, const Tensor& cos_sin_,
                      bool interleaved, const Tensor& q_out_, const Tensor& k_out_) {
  const char* op = "rotary_embedding";
  const View q(op, "q", q_), k(op, "k", k_), positions(op, "positions", positions_),
      cos_sin(op, "cos_sin", cos_sin_), q_out(op, "q_out", q_out_), k_out(op, "k_out", k_out_);
  aserve::RotaryArgs a = rotary_args(q, k, positions, cos_sin, interleaved, q_out);
  same_shape(k, k_out);
  check_same_type(k, k_out);
  k_out.dense_from(0);
  a.k_out = k_out.data;
  check(op, table(op).rotary(a, threads()));
}

const int64_t* slot_data(const View& slots, int64_t tokens) {
  slots.rank(1).size(0, tokens).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  return static_cast<const int64_t*>(slots.data);
}

void rope_and_store(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& positions_,
                    const Tensor& cos_sin_, bool interleaved, const Tensor& k_cache_, const Tensor& v_cache_,
                    const Tensor& slots_, const Tensor& q_out_) {
  const char* op = "rope_and_store";
  const View q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), positions(op, "positions", positions_),
      cos_sin(op, "cos_sin", cos_sin_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_),
      slots(op, "slots", slots_), q_out(op, "q_out", q_out_);
  aserve::RotaryArgs a = rotary_args(q, k, positions, cos_sin, interleaved, q_out);
  same_shape(k, v);
  check_same_type(k, v);
  v.dense_from(1);
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, a);
  a.v = v.data;
  a.v_stride = v.strides[0];
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.slots = slot_data(slots, a.tokens);
  check(op, table(op).rotary(a, threads()));
}

void store_kv(const Tensor& k_, const Tensor& v_, const Tensor& k_cache_, const Tensor& v_cache_,
              const Tensor& slots_) {
  const char* op = "store_kv";
  const View k(op, "k", k_), v(op, "v", v_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_),
      slots(op, "slots", slots_);
  aserve::StoreArgs a = {};
  k.rank(3).dense_from(1);
  same_shape(k, v);
  v.dense_from(1);
  check_same_type(k, v);
  a.tokens = k.sizes[0];
  a.kv_heads = k.sizes[1];
  a.head_size = k.sizes[2];
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, a);
  a.k = k.data;
  a.v = v.data;
  a.k_stride = k.strides[0];
  a.v_stride = v.strides[0];
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.slots = slot_data(slots, a.tokens);
  a.dtype = k.storage();
  check(op, table(op).store(a, threads()));
}

void paged_attention(const Tensor& q_, const Tensor& k_cache_, const Tensor& v_cache_, const Tensor& query_start_,
                     const Tensor& seq_lens_, const Tensor& block_tables_, double scale, int64_t window,
                     double softcap, std::optional<Tensor> alibi_slopes_, const Tensor& out_) {
  const char* op = "paged_attention";
  const View q(op, "q", q_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_),
      query_start(op, "query_start", query_start_), seq_lens(op, "seq_lens", seq_lens_),
      block_tables(op, "block_tables", block_tables_), out(op, "out", out_);
  aserve::AttentionArgs a = {};
  q.rank(3).dense_from(2);
  k_cache.rank(4);
  a.q_heads = q.sizes[1];
  a.kv_heads = k_cache.sizes[1];
  a.head_size = q.sizes[2];
  if (a.kv_heads < 1 || a.q_heads % a.kv_heads != 0)
    refuse(op, a.q_heads, " query heads do not divide among ", a.kv_heads, " KV heads");
  if (a.head_size < 8 || a.head_size > 256 || a.head_size % 8 != 0)
    refuse(op, "the head size must be a multiple of 8 from 8 to 256, is ", a.head_size);
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, a);
  same_shape(q, out);
  out.dense_from(0);
  check_same_type(q, out);
  read_rows(query_start, seq_lens, block_tables, q.sizes[0], a.block_size, a);
  if (alibi_slopes_.has_value()) {
    const View slopes(op, "alibi_slopes", *alibi_slopes_);
    slopes.rank(1).size(0, a.q_heads).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
    a.alibi_slopes = static_cast<const float*>(slopes.data);
  }
  if (window < 0) refuse(op, "window must not be negative");
  a.q = q.data;
  a.out = out.data;
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.q_token = q.strides[0];
  a.q_head = q.strides[1];
  a.window = window;
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.dtype = q.storage();
  check(op, table(op).attention(a, threads()));
}

void gated(const Tensor& x_, int64_t activation, const Tensor& out_) {
  const char* op = "gated";
  const View x(op, "x", x_), out(op, "out", out_);
  aserve::GatedArgs a = {};
  a.x_rows = rows_of(x);
  a.size = x.sizes[x.dims - 1] / 2;
  if (2 * a.size != x.sizes[x.dims - 1]) refuse(op, "the last dimension of x must be even");
  out.rank(x.dims).size(x.dims - 1, a.size).dense_from(0);
  for (int64_t d = 0; d + 1 < x.dims; d++) out.size(d, x.sizes[d]);
  check_same_type(x, out);
  if (activation < 0 || activation > 2) refuse(op, "unknown activation ", activation);
  a.x = x.data;
  a.out = out.data;
  a.dtype = x.storage();
  table(op).gated(a, static_cast<aserve::Activation>(activation), threads());
}

void move_blocks(const char* op, const View& source, const View& target, const Tensor& pairs_) {
  const View pairs(op, "pairs", pairs_);
  if (source.dims < 2) refuse(op, source.name, " must have blocks of at least one dimension");
  source.dense_from(1);
  target.rank(source.dims).dense_from(1);
  check_same_type(source, target);
  pairs.rank(2).size(1, 2).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  aserve::CopyArgs a = {};
  a.source = source.data;
  a.target = target.data;
  a.pairs = static_cast<const int64_t*>(pairs.data);
  a.count = pairs.sizes[0];
  a.source_blocks = source.sizes[0];
  a.target_blocks = target.sizes[0];
  a.block_bytes = source.element_bytes();
  for (int64_t d = 1; d < source.dims; d++) {
    target.size(d, source.sizes[d]);
    a.block_bytes *= source.sizes[d];
  }
  a.source_stride = source.strides[0] * source.element_bytes();
  a.target_stride = target.strides[0] * target.element_bytes();
  check(op, aserve::copy_blocks(a));
}

void copy_blocks(const Tensor& cache_, const Tensor& pairs) {
  const View cache("copy_blocks", "cache", cache_);
  move_blocks("copy_blocks", cache, cache, pairs);
}

void swap_blocks(const Tensor& source, const Tensor& target, const Tensor& pairs) {
  const char* op = "swap_blocks";
  move_blocks(op, View(op, "source", source), View(op, "target", target), pairs);
}

void greedy_logprob(const Tensor& logits_, const Tensor& token_, const Tensor& logprob_) {
  const char* op = "greedy_logprob";
  const View logits(op, "logits", logits_), token(op, "token", token_), logprob(op, "logprob", logprob_);
  aserve::LogprobArgs a = {};
  logits.rank(2).dense_from(1);
  a.rows = logits.sizes[0];
  a.size = logits.sizes[1];
  if (a.size < 1) refuse(op, "logits must have a column");
  token.rank(1).size(0, a.rows).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  logprob.rank(1).size(0, a.rows).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  a.logits = logits.data;
  a.token = static_cast<int64_t*>(token.data);
  a.logprob = static_cast<float*>(logprob.data);
  a.stride = logits.strides[0];
  a.dtype = logits.storage();
  table(op).greedy_logprob(a, threads());
}

void greedy_allowed(const Tensor& logits_, const Tensor& allowed_, const Tensor& token_, const Tensor& logprob_) {
  const char* op = "greedy_allowed";
  const View logits(op, "logits", logits_), allowed(op, "allowed", allowed_), token(op, "token", token_),
      logprob(op, "logprob", logprob_);
  aserve::AllowedArgs a = {};
  logits.rank(2).typed(aoti_torch_dtype_float32(), "float32").dense_from(1);
  a.rows = logits.sizes[0];
  a.size = logits.sizes[1];
  a.words = (a.size + 31) / 32;
  if (a.size < 1) refuse(op, "logits must have a column");
  allowed.rank(2).size(0, a.rows).size(1, a.words).typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
  token.rank(1).size(0, a.rows).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  logprob.rank(1).size(0, a.rows).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  a.logits = static_cast<const float*>(logits.data);
  a.allowed = static_cast<const uint32_t*>(allowed.data);
  a.token = static_cast<int64_t*>(token.data);
  a.logprob = static_cast<float*>(logprob.data);
  a.stride = logits.strides[0];
  table(op).greedy_allowed(a, threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aserve, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def(
      "fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, Tensor(a!) out, "
      "Tensor(b!) total) -> ()");
  m.def(
      "rotary_embedding(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, bool interleaved, "
      "Tensor(a!) q_out, Tensor(b!) k_out) -> ()");
  m.def(
      "rope_and_store(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, bool interleaved, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!) q_out) -> ()");
  m.def("store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start, Tensor seq_lens, "
      "Tensor block_tables, float scale, int window, float softcap, Tensor? alibi_slopes, "
      "Tensor(a!) out) -> ()");
  m.def("gated(Tensor x, int activation, Tensor(a!) out) -> ()");
  m.def("copy_blocks(Tensor(a!) cache, Tensor pairs) -> ()");
  m.def("swap_blocks(Tensor source, Tensor(a!) target, Tensor pairs) -> ()");
  m.def("greedy_allowed(Tensor logits, Tensor allowed, Tensor(a!) token, Tensor(b!) logprob) -> ()");
  m.def("greedy_logprob(Tensor logits, Tensor(a!) token, Tensor(b!) logprob) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aserve, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("rope_and_store", TORCH_BOX(&rope_and_store));
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks));
  m.impl("greedy_allowed", TORCH_BOX(&greedy_allowed));
  m.impl("greedy_logprob", TORCH_BOX(&greedy_logprob));
}

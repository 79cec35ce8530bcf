// Binding of the CPU kernels to torch's stable ABI, and the schemas of the operations. arguments.h checks
// shapes, dtypes and strides; then pointers go to the kernels. Outputs are made by the caller, so that every
// op only writes into tensors it is given.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "binding.h"
#include "cpu/sampling.h"

namespace {

void norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
          const Tensor& out, const Tensor* total) {
  std::optional<View> other, sum;
  if (residual != nullptr) {
    other.emplace(op, "residual", *residual);
    sum.emplace(op, "total", *total);
  }
  table(op).norm(norm_args<aserve::NormArgs>({op, "x", x}, other ? &*other : nullptr, {op, "weight", weight}, eps,
                                             {op, "out", out}, sum ? &*sum : nullptr),
                 threads());
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  norm("rms_norm", x, nullptr, weight, eps, out, nullptr);
}

void fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                        const Tensor& out, const Tensor& total) {
  norm("fused_add_rms_norm", x, &residual, weight, eps, out, &total);
}

void rotary_embedding(const Tensor& q, const Tensor& k_, const Tensor& positions, const Tensor& cos_sin,
                      bool interleaved, const Tensor& q_out, const Tensor& k_out) {
  const char* op = "rotary_embedding";
  const View k(op, "k", k_);
  auto a = rotary_args<aserve::RotaryArgs>({op, "q", q}, k, {op, "positions", positions}, {op, "cos_sin", cos_sin},
                                           interleaved, {op, "q_out", q_out});
  read_k_out(k, {op, "k_out", k_out}, a);
  check(op, table(op).rotary(a, threads()));
}

void rope_and_store(const Tensor& q, const Tensor& k_, const Tensor& v, const Tensor& positions,
                    const Tensor& cos_sin, bool interleaved, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slots, double k_scale, double v_scale, const Tensor& q_out) {
  const char* op = "rope_and_store";
  const View k(op, "k", k_);
  auto a = rotary_args<aserve::RotaryArgs>({op, "q", q}, k, {op, "positions", positions}, {op, "cos_sin", cos_sin},
                                           interleaved, {op, "q_out", q_out});
  read_stored(k, {op, "v", v}, {op, "k_cache", k_cache}, {op, "v_cache", v_cache}, {op, "slots", slots}, k_scale,
              v_scale, a);
  check(op, table(op).rotary(a, threads()));
}

void store_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
              double k_scale, double v_scale) {
  const char* op = "store_kv";
  aserve::StoreArgs a = {};
  read_stored({op, "k", k}, {op, "v", v}, {op, "k_cache", k_cache}, {op, "v_cache", v_cache}, {op, "slots", slots},
              k_scale, v_scale, a);
  check(op, table(op).store(a, threads()));
}

void paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                     const Tensor& seq_lens, const Tensor& block_tables, double scale, int64_t window,
                     double softcap, std::optional<Tensor> alibi_slopes, double k_scale, double v_scale,
                     int64_t max_query_len, const Tensor& out) {
  const char* op = "paged_attention";
  std::optional<View> slopes;
  if (alibi_slopes.has_value()) slopes.emplace(op, "alibi_slopes", *alibi_slopes);
  const View queries(op, "q", q);
  const auto a = attention_args<aserve::AttentionArgs>(
      queries, {op, "k_cache", k_cache}, {op, "v_cache", v_cache}, {op, "query_start", query_start},
      {op, "seq_lens", seq_lens}, {op, "block_tables", block_tables}, scale, window, softcap, slopes, k_scale,
      v_scale, max_query_len, {op, "out", out});
  check_rows(op, a, queries.sizes[0], a.block_size);
  check(op, table(op).attention(a, threads()));
}

void gated(const Tensor& x, int64_t activation, const Tensor& out) {
  const char* op = "gated";
  const auto a = gated_args<aserve::GatedArgs>({op, "x", x}, activation, {op, "out", out});
  table(op).gated(a, static_cast<aserve::Activation>(activation), threads());
}

void move_blocks(const View& source, const View& target, const View& pairs) {
  const Blocks b = block_layout(source, target);
  aserve::CopyArgs a = {};
  a.source = source.data;
  a.target = target.data;
  a.pairs = pair_data(pairs);
  a.count = pairs.sizes[0];
  a.source_blocks = b.source_blocks;
  a.target_blocks = b.target_blocks;
  a.block_bytes = b.block_bytes;
  a.source_stride = b.source_stride;
  a.target_stride = b.target_stride;
  check(source.op, aserve::copy_blocks(a));
}

void copy_blocks(std::vector<Tensor> caches, const Tensor& pairs) {
  const char* op = "copy_blocks";
  for (const Tensor& each : caches) {
    const View cache(op, "a cache", each);
    move_blocks(cache, cache, {op, "pairs", pairs});
  }
}

void swap_blocks(std::vector<Tensor> sources, std::vector<Tensor> targets, const Tensor& pairs) {
  const char* op = "swap_blocks";
  check_sides(op, sources.size(), targets.size());
  for (size_t side = 0; side < sources.size(); side++)
    move_blocks({op, "a source", sources[side]}, {op, "a target", targets[side]}, {op, "pairs", pairs});
}

void greedy_logprob(const Tensor& logits, const Tensor& token, const Tensor& logprob) {
  const char* op = "greedy_logprob";
  const auto a =
      drawn_args<aserve::LogprobArgs>({op, "logits", logits}, {op, "token", token}, {op, "logprob", logprob});
  table(op).greedy_logprob(a, threads());
}

void penalties(const Tensor& logits, const Tensor& starts, const Tensor& ids_, const Tensor& counts,
               const Tensor& repetition, const Tensor& frequency, const Tensor& presence) {
  const char* op = "penalties";
  const View ids(op, "ids", ids_);
  const auto a = penalty_args<aserve::PenaltyArgs>(
      {op, "logits", logits}, {op, "starts", starts}, ids, {op, "counts", counts}, {op, "repetition", repetition},
      {op, "frequency", frequency}, {op, "presence", presence});
  if (a.starts[0] != 0 || a.starts[a.rows] != ids.sizes[0])
    refuse(op, "starts must run from 0 to the number of ids, ", ids.sizes[0]);
  for (int64_t row = 0; row < a.rows; row++)
    if (a.starts[row + 1] < a.starts[row]) refuse(op, "starts falls at row ", row);
  check(op, aserve::penalties(a));
}

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& seeds, const Tensor& positions,
            const Tensor& token, const Tensor& logprob) {
  const char* op = "sample";
  auto a = drawn_args<aserve::SampleArgs>({op, "logits", logits}, {op, "token", token}, {op, "logprob", logprob});
  read_draw({op, "temperature", temperature}, {op, "seeds", seeds}, {op, "positions", positions}, a);
  check(op, aserve::sample(a));
}

void greedy_allowed(const Tensor& logits_, const Tensor& allowed_, const Tensor& token, const Tensor& logprob) {
  const char* op = "greedy_allowed";
  const View logits(op, "logits", logits_), allowed(op, "allowed", allowed_);
  const auto drawn = drawn_args<aserve::LogprobArgs>(logits, {op, "token", token}, {op, "logprob", logprob});
  logits.typed(aoti_torch_dtype_float32(), "float32");
  aserve::AllowedArgs a = {};
  a.rows = drawn.rows;
  a.size = drawn.size;
  a.words = (a.size + 31) / 32;
  allowed.rank(2).size(0, a.rows).size(1, a.words).typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
  a.logits = static_cast<const float*>(logits.data);
  a.allowed = static_cast<const uint32_t*>(allowed.data);
  a.token = drawn.token;
  a.logprob = drawn.logprob;
  a.stride = drawn.stride;
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
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, float k_scale, float v_scale, "
      "Tensor(c!) q_out) -> ()");
  m.def(
      "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, float k_scale, "
      "float v_scale) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start, Tensor seq_lens, "
      "Tensor block_tables, float scale, int window, float softcap, Tensor? alibi_slopes, "
      "float k_scale, float v_scale, int max_query_len, Tensor(a!) out) -> ()");
  m.def("gated(Tensor x, int activation, Tensor(a!) out) -> ()");
  m.def("copy_blocks(Tensor(a!)[] caches, Tensor pairs) -> ()");
  m.def("swap_blocks(Tensor[] sources, Tensor(a!)[] targets, Tensor pairs) -> ()");
  m.def("greedy_allowed(Tensor logits, Tensor allowed, Tensor(a!) token, Tensor(b!) logprob) -> ()");
  m.def("greedy_logprob(Tensor logits, Tensor(a!) token, Tensor(b!) logprob) -> ()");
  m.def(
      "penalties(Tensor(a!) logits, Tensor starts, Tensor ids, Tensor counts, Tensor repetition, "
      "Tensor frequency, Tensor presence) -> ()");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor(a!) token, "
      "Tensor(b!) logprob) -> ()");
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
  m.impl("penalties", TORCH_BOX(&penalties));
  m.impl("sample", TORCH_BOX(&sample));
}

// Binding of the decoder. Its layers are described once, in a tensor of bytes that holds pointers to their
// weights and caches: the caller keeps those alive and unmoved as long as it uses the description.
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "binding.h"
#include "cpu/decoder.h"

#ifdef ASERVE_PROFILE
uint64_t aserve::decoder_ticks[8];
extern "C" __attribute__((visibility("default"))) uint64_t* aserve_decoder_ticks() { return aserve::decoder_ticks; }
#endif

namespace {

using aserve::DecoderLayer;
using aserve::DecoderStack;
using aserve::PackedWeight;

constexpr uint64_t kDescription = 0x6173657276656463;

struct Description {
  uint64_t kind;
  DecoderStack stack;
  DecoderLayer layers[];
};

int64_t description_bytes(int64_t layers) {
  return static_cast<int64_t>(sizeof(Description) + static_cast<size_t>(layers) * sizeof(DecoderLayer));
}

Description& described(const char* op, const Tensor& description_) {
  const View view(op, "description", description_);
  view.rank(1).typed(aoti_torch_dtype_uint8(), "uint8").dense_from(0);
  Description* const d = static_cast<Description*>(view.data);
  if (view.sizes[0] < description_bytes(0) || reinterpret_cast<uintptr_t>(d) % alignof(Description) != 0 ||
      d->kind != kDescription || view.sizes[0] != description_bytes(d->stack.layers))
    refuse(op, "this is no description of layers");
  return *d;
}

DecoderLayer& layer_of(const char* op, Description& d, int64_t layer) {
  if (layer < 0 || layer >= d.stack.layers) refuse(op, "there is no layer ", layer);
  return d.layers[layer];
}

const float* vector(const char* op, const char* name, const Tensor& tensor, int64_t size) {
  const View view(op, name, tensor);
  view.rank(1).size(0, size).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  return static_cast<const float*>(view.data);
}

const float* vector(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t size) {
  return tensor.has_value() ? vector(op, name, *tensor, size) : nullptr;
}

void decoder_stack(const Tensor& description_, int64_t layers, int64_t q_heads, int64_t kv_heads, int64_t head_size,
                   const Tensor& final_norm, double final_eps) {
  const char* op = "decoder_stack";
  const View view(op, "description", description_), norm(op, "final_norm", final_norm);
  if (layers < 1) refuse(op, "there must be a layer");
  if (kv_heads < 1 || q_heads < 1 || q_heads % kv_heads != 0)
    refuse(op, q_heads, " query heads do not divide among ", kv_heads, " KV heads");
  if (head_size < 16 || head_size > 256 || head_size % 16 != 0)
    refuse(op, "the head size must be a multiple of 16 from 16 to 256, is ", head_size);
  view.rank(1).typed(aoti_torch_dtype_uint8(), "uint8").dense_from(0).size(0, description_bytes(layers));
  Description* const d = static_cast<Description*>(view.data);
  if (reinterpret_cast<uintptr_t>(d) % alignof(Description) != 0) refuse(op, "description is not aligned");
  std::memset(view.data, 0, static_cast<size_t>(view.sizes[0]));
  DecoderStack& s = d->stack;
  s.layers = layers;
  s.hidden = norm.rank(1).sizes[0];
  s.q_heads = q_heads;
  s.kv_heads = kv_heads;
  s.head_size = head_size;
  s.final_norm = vector(op, "final_norm", final_norm, s.hidden);
  s.final_eps = static_cast<float>(final_eps);
  d->kind = kDescription;
}

PackedWeight packed(const char* op, const char* name, const Tensor& data_, const std::optional<Tensor>& bias,
                    int64_t format, int64_t rows, int64_t columns) {
  const View data(op, name, data_);
  if (rows < 1) refuse(op, name, " must have a row");
  PackedWeight weight = packed_weight(data, format, rows, columns);
  weight.bias = vector(op, "bias", bias, rows);
  return weight;
}

// which: 0 .. 6, in the order of DecoderLayer.
void decoder_weight(const Tensor& description_, int64_t layer, int64_t which, const Tensor& data_,
                    std::optional<Tensor> bias, int64_t format_, int64_t rows, int64_t columns) {
  const char* op = "decoder_weight";
  DecoderLayer& l = layer_of(op, described(op, description_), layer);
  PackedWeight* const weights[] = {&l.q, &l.k, &l.v, &l.out, &l.gate, &l.up, &l.down};
  if (which < 0 || which > 6) refuse(op, "there is no weight ", which);
  *weights[which] = packed(op, "data", data_, bias, format_, rows, columns);
}

int window_index(const char* op, DecoderStack& s, int64_t window) {
  for (int i = 0; i < s.num_windows; i++)
    if (s.windows[i] == window) return i;
  if (s.num_windows == aserve::kMaxWindows) refuse(op, "there are more than ", aserve::kMaxWindows, " windows");
  s.windows[s.num_windows] = window;
  return s.num_windows++;
}

void decoder_layer(const Tensor& description_, int64_t layer, const Tensor& input_norm,
                   std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                   std::optional<Tensor> post_attention_norm, const Tensor& pre_mlp_norm,
                   std::optional<Tensor> post_mlp_norm, const Tensor& cos_sin_, bool interleaved, double scale,
                   int64_t window, double softcap, int64_t activation, double eps) {
  const char* op = "decoder_layer";
  Description& d = described(op, description_);
  DecoderStack& s = d.stack;
  DecoderLayer& l = layer_of(op, d, layer);
  const int64_t wide = s.q_heads * s.head_size, narrow = s.kv_heads * s.head_size, mlp = l.gate.rows;
  const auto shaped = [&](const char* name, const PackedWeight& w, int64_t rows, int64_t columns) {
    if (w.data == nullptr) refuse(op, "layer ", layer, " lacks ", name);
    if (w.rows != rows || w.columns != columns)
      refuse(op, name, " must be ", rows, " by ", columns, ", is ", w.rows, " by ", w.columns);
  };
  shaped("q", l.q, wide, s.hidden);
  shaped("k", l.k, narrow, s.hidden);
  shaped("v", l.v, narrow, s.hidden);
  shaped("out", l.out, s.hidden, wide);
  shaped("gate", l.gate, mlp, s.hidden);
  shaped("up", l.up, mlp, s.hidden);
  shaped("down", l.down, s.hidden, mlp);
  l.input_norm = vector(op, "input_norm", input_norm, s.hidden);
  l.q_norm = vector(op, "q_norm", q_norm, s.head_size);
  l.k_norm = vector(op, "k_norm", k_norm, s.head_size);
  l.post_attention_norm = vector(op, "post_attention_norm", post_attention_norm, s.hidden);
  l.pre_mlp_norm = vector(op, "pre_mlp_norm", pre_mlp_norm, s.hidden);
  l.post_mlp_norm = vector(op, "post_mlp_norm", post_mlp_norm, s.hidden);
  const View cos_sin(op, "cos_sin", cos_sin_);
  cos_sin.rank(2).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  l.cos_sin = static_cast<const float*>(cos_sin.data);
  l.max_position = cos_sin.sizes[0];
  l.rotary_size = cos_sin.sizes[1];
  if (l.rotary_size % 2 != 0 || l.rotary_size > s.head_size)
    refuse(op, "cos_sin must have an even number of columns, at most ", s.head_size);
  if (window < 0) refuse(op, "window must not be negative");
  if (activation < 0 || activation > 2) refuse(op, "unknown activation ", activation);
  l.window = window_index(op, s, window);
  l.interleaved = interleaved;
  l.scale = static_cast<float>(scale);
  l.softcap = static_cast<float>(softcap);
  l.activation = static_cast<aserve::Activation>(activation);
  l.eps = static_cast<float>(eps);
}

void decoder_cache(const Tensor& description_, int64_t layer, const Tensor& k_cache_, const Tensor& v_cache_) {
  const char* op = "decoder_cache";
  Description& d = described(op, description_);
  DecoderStack& s = d.stack;
  DecoderLayer& l = layer_of(op, d, layer);
  const View k(op, "k_cache", k_cache_), v(op, "v_cache", v_cache_);
  DecoderStack seen = s;
  read_cache(k, v, s.kv_heads, s.head_size, 1, 1, seen);
  // The first layer's cache says how all lie.
  if (layer == 0) {
    s = seen;
    for (int64_t i = 0; i < s.layers; i++) d.layers[i].k_cache = nullptr;
  }
  if (seen.cache_dtype != s.cache_dtype || seen.num_blocks != s.num_blocks || seen.block_size != s.block_size ||
      seen.cache_block != s.cache_block || seen.cache_head != s.cache_head || seen.cache_slot != s.cache_slot)
    refuse(op, "the caches of all layers must have one layout");
  l.k_cache = k.data;
  l.v_cache = v.data;
}

void decoder_ends(const Tensor& description_, const Tensor& embedding, int64_t embedding_format, double factor,
                  const Tensor& head, int64_t head_format, int64_t vocabulary) {
  const char* op = "decoder_ends";
  DecoderStack& s = described(op, description_).stack;
  const std::optional<Tensor> no_bias;
  s.embedding = packed(op, "embedding", embedding, no_bias, embedding_format, vocabulary, s.hidden);
  s.head = packed(op, "head", head, no_bias, head_format, vocabulary, s.hidden);
  s.embedding_factor = static_cast<float>(factor);
}

void check_whole(const char* op, const Description& d) {
  for (int64_t i = 0; i < d.stack.layers; i++)
    if (d.layers[i].cos_sin == nullptr || d.layers[i].k_cache == nullptr) refuse(op, "layer ", i, " is not described whole");
}

// A step of one token a row: embedding, layers, head, likeliest token, which becomes the row's next.
// Steps of one token a row, all rows together, and the likeliest next token of each written behind it.
class GreedyRun {
 public:
  GreedyRun(const char* op, Description& d, View& tokens, View& tables, View& rows, View& positions)
      : op_(op), d_(d), s_(d.stack), kernels_(table(op)), count_(rows.rank(1).sizes[0]), width_(tokens.rank(2).sizes[1]),
        max_blocks_(tables.rank(2).sizes[1]) {
    tokens.typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
    tables.size(0, tokens.sizes[0]).typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
    for (View* v : {&rows, &positions})
      v->rank(1).size(0, count_).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
    rows_ = static_cast<const int64_t*>(rows.data);
    tokens_ = static_cast<int32_t*>(tokens.data);
    tables_ = static_cast<const int32_t*>(tables.data);
    const int64_t* const first = static_cast<const int64_t*>(positions.data);
    positions_.assign(first, first + count_);
    for (int64_t i = 0; i < count_; i++)
      if (rows_[i] < 0 || rows_[i] >= tokens.sizes[0]) refuse(op_, "there is no row ", rows_[i]);
    starts_.resize(static_cast<size_t>(count_ + 1));
    for (int64_t i = 0; i <= count_; i++) starts_[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    lengths_.resize(static_cast<size_t>(count_));
    ids_.resize(static_cast<size_t>(count_));
    places_.resize(static_cast<size_t>(count_));
  }

  int64_t count() const { return count_; }

  // Refuses rows that a run of this many steps would leave.
  void check_steps(int64_t steps) {
    int64_t longest = 0;
    for (const int64_t position : positions_) {
      if (position < 0 || position + steps >= width_ || (position + steps - 1) / s_.block_size >= max_blocks_)
        refuse(op_, "position ", position, " is outside the row");
      if (position >= longest) longest = position + 1;
    }
    used_ = (longest + steps - 1 + s_.block_size - 1) / s_.block_size;
    table_rows_.resize(static_cast<size_t>(count_ * used_));
    for (int64_t i = 0; i < count_; i++)
      std::memcpy(&table_rows_[static_cast<size_t>(i * used_)], tables_ + rows_[i] * max_blocks_,
                  static_cast<size_t>(used_) * sizeof(int32_t));
  }

  // One step; drawn [rows], logprobs [rows].
  void step(float* x, float* out, float* logits, int64_t* drawn, float* logprobs) {
    for (int64_t i = 0; i < count_; i++) {
      const auto at = static_cast<size_t>(i);
      const int64_t position = positions_[at];
      lengths_[at] = static_cast<int32_t>(position + 1);
      ids_[at] = tokens_[rows_[i] * width_ + position];
      places_[at] = table_rows_[static_cast<size_t>(i * used_ + position / s_.block_size)] * s_.block_size +
                    position % s_.block_size;
    }
    check(op_, kernels_.packed_rows({s_.embedding, ids_.data(), x, count_}, threads()));
    if (s_.embedding_factor != 1.0f)
      for (int64_t i = 0; i < count_ * s_.hidden; i++) x[i] *= s_.embedding_factor;
    aserve::DecoderArgs a = {};
    a.stack = &s_;
    a.layers = d_.layers;
    a.x = x;
    a.out = out;
    a.positions = positions_.data();
    a.slots = places_.data();
    a.query_start = starts_.data();
    a.seq_lens = lengths_.data();
    a.block_tables = table_rows_.data();
    a.tokens = a.rows = count_;
    a.max_blocks = a.table_stride = used_;
    check(op_, kernels_.decoder(a, threads().count));
    const aserve::DType f32 = aserve::DType::f32;
    check(op_, kernels_.packed_linear({s_.head, out, {count_, count_, s_.hidden, 0}, logits, f32, f32}, threads()));
    kernels_.greedy_logprob({logits, drawn, logprobs, count_, s_.head.rows, s_.head.rows, f32}, threads());
    for (int64_t i = 0; i < count_; i++)
      tokens_[rows_[i] * width_ + ++positions_[static_cast<size_t>(i)]] = static_cast<int32_t>(drawn[i]);
  }

 private:
  const char* op_;
  Description& d_;
  const DecoderStack& s_;
  const aserve::Kernels& kernels_;
  int64_t count_, width_, max_blocks_, used_ = 0;
  const int64_t* rows_;
  int32_t* tokens_;
  const int32_t* tables_;
  std::vector<int32_t> starts_, lengths_, table_rows_;
  std::vector<int64_t> positions_, ids_, places_;
};

// made [1]: how many steps were made, fewer than the rows of token_ids once a row drew the token that ends it or
// has no likeliest one, the time is up, or halt has reached number.
void decoder_greedy(const Tensor& description_, const Tensor& tokens_, const Tensor& block_tables_,
                    const Tensor& rows_, const Tensor& positions_, const Tensor& ends_, const Tensor& halt_,
                    int64_t number, double seconds, const Tensor& hidden_, const Tensor& out_, const Tensor& logits_,
                    const Tensor& token_ids_, const Tensor& logprobs_, const Tensor& made_) {
  const char* op = "decoder_greedy";
  Description& d = described(op, description_);
  const DecoderStack& s = d.stack;
  check_whole(op, d);
  if (s.embedding.data == nullptr) refuse(op, "embedding and head are not described");
  View tokens(op, "tokens", tokens_), tables(op, "block_tables", block_tables_), rows(op, "rows", rows_),
      positions(op, "positions", positions_), ends(op, "ends", ends_), halt(op, "halt", halt_),
      hidden(op, "hidden", hidden_), out(op, "out", out_), logits(op, "logits", logits_),
      token_ids(op, "token_ids", token_ids_), logprobs(op, "logprobs", logprobs_), made(op, "made", made_);
  GreedyRun run(op, d, tokens, tables, rows, positions);
  const int64_t count = run.count(), steps = token_ids.rank(2).sizes[0];
  const int32_t int64 = aoti_torch_dtype_int64();
  token_ids.size(1, count).typed(int64, "int64").dense_from(0);
  ends.rank(1).size(0, count).typed(int64, "int64").dense_from(0);
  for (const View* v : {&halt, &made}) v->rank(1).size(0, 1).typed(int64, "int64");
  for (const View* v : {&hidden, &out})
    v->rank(2).size(0, count).size(1, s.hidden).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  logits.rank(2).size(0, count).size(1, s.head.rows).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  logprobs.rank(2).size(0, steps).size(1, count).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  int64_t& done = *static_cast<int64_t*>(made.data);
  done = 0;
  if (count == 0) return;
  run.check_steps(steps);
  int64_t* const drawn = static_cast<int64_t*>(token_ids.data);
  float* const logprob = static_cast<float*>(logprobs.data);
  const int64_t* const end = static_cast<const int64_t*>(ends.data);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  for (bool stop = steps == 0; !stop;) {
    const int64_t at = done++ * count;
    run.step(static_cast<float*>(hidden.data), static_cast<float*>(out.data), static_cast<float*>(logits.data),
             drawn + at, logprob + at);
    stop = done == steps || __atomic_load_n(static_cast<const int64_t*>(halt.data), __ATOMIC_RELAXED) >= number;
    for (int64_t i = 0; i < count && !stop; i++) stop = drawn[at + i] == end[i] || !std::isfinite(logprob[at + i]);
    const double spent = std::chrono::duration<double>(Clock::now() - start).count();
    stop = stop || spent + spent / static_cast<double>(done) > seconds;
  }
}

void decoder_forward(const Tensor& description_, const Tensor& hidden_, const Tensor& positions_,
                     const Tensor& query_start_, const Tensor& seq_lens_, const Tensor& block_tables_,
                     const Tensor& slots_, const Tensor& out_) {
  const char* op = "decoder_forward";
  Description& d = described(op, description_);
  const DecoderStack& s = d.stack;
  check_whole(op, d);
  const View hidden(op, "hidden", hidden_), positions(op, "positions", positions_),
      query_start(op, "query_start", query_start_), seq_lens(op, "seq_lens", seq_lens_),
      block_tables(op, "block_tables", block_tables_), slots(op, "slot_mapping", slots_), out(op, "out", out_);
  aserve::DecoderArgs a = {};
  hidden.rank(2).size(1, s.hidden).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  same_shape(hidden, out);
  check_same_type(hidden, out);
  out.dense_from(0);
  a.stack = &s;
  a.tokens = hidden.sizes[0];
  a.x = static_cast<const float*>(hidden.data);
  a.out = static_cast<float*>(out.data);
  if (a.x == a.out && a.tokens > 0) refuse(op, "out must not be hidden");
  positions.rank(1).size(0, a.tokens).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  slots.rank(1).size(0, a.tokens).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  a.positions = static_cast<const int64_t*>(positions.data);
  a.slots = static_cast<const int64_t*>(slots.data);
  read_rows(query_start, seq_lens, block_tables, a);
  check_rows(op, a, a.tokens, s.block_size);
  a.layers = d.layers;
  check(op, table(op).decoder(a, threads().count));
}

}  // namespace

// Called through ctypes by aserve.ops.decoder: the bytes of a description.
extern "C" __attribute__((visibility("default"))) int64_t aserve_decoder_bytes(int64_t layers) {
  return layers < 1 ? -1 : description_bytes(layers);
}

STABLE_TORCH_LIBRARY_FRAGMENT(aserve, m) {
  m.def(
      "decoder_stack(Tensor(a!) description, int layers, int q_heads, int kv_heads, int head_size, "
      "Tensor final_norm, float final_eps) -> ()");
  m.def(
      "decoder_weight(Tensor(a!) description, int layer, int which, Tensor data, Tensor? bias, int format, "
      "int rows, int columns) -> ()");
  m.def(
      "decoder_layer(Tensor(a!) description, int layer, Tensor input_norm, Tensor? q_norm, Tensor? k_norm, "
      "Tensor? post_attention_norm, Tensor pre_mlp_norm, Tensor? post_mlp_norm, Tensor cos_sin, "
      "bool interleaved, float scale, int window, float softcap, int activation, float eps) -> ()");
  m.def("decoder_cache(Tensor(a!) description, int layer, Tensor k_cache, Tensor v_cache) -> ()");
  m.def(
      "decoder_ends(Tensor(a!) description, Tensor embedding, int embedding_format, float factor, Tensor head, "
      "int head_format, int vocabulary) -> ()");
  m.def(
      "decoder_greedy(Tensor(a!) description, Tensor(b!) tokens, Tensor block_tables, Tensor rows, "
      "Tensor positions, Tensor ends, Tensor halt, int number, float seconds, Tensor(c!) hidden, "
      "Tensor(d!) out, Tensor(e!) logits, Tensor(f!) token_ids, Tensor(g!) logprobs, Tensor(h!) made) -> ()");
  m.def(
      "decoder_forward(Tensor(a!) description, Tensor hidden, Tensor positions, Tensor query_start, "
      "Tensor seq_lens, Tensor block_tables, Tensor slot_mapping, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aserve, CPU, m) {
  m.impl("decoder_stack", TORCH_BOX(&decoder_stack));
  m.impl("decoder_weight", TORCH_BOX(&decoder_weight));
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
  m.impl("decoder_cache", TORCH_BOX(&decoder_cache));
  m.impl("decoder_ends", TORCH_BOX(&decoder_ends));
  m.impl("decoder_greedy", TORCH_BOX(&decoder_greedy));
  m.impl("decoder_forward", TORCH_BOX(&decoder_forward));
}

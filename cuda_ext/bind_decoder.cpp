// Binding of the decoder. Its layers are described once, in a tensor of bytes that holds pointers to their
// weights and caches: the caller keeps those alive and unmoved as long as it uses the description.
#include <torch/csrc/stable/library.h>

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
  read_cache(k, v, s.kv_heads, s.head_size, seen);
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
void decoder_greedy(const Tensor& description_, const Tensor& tokens_, const Tensor& block_tables_,
                    const Tensor& rows_, const Tensor& positions_, const Tensor& hidden_, const Tensor& out_,
                    const Tensor& logits_, const Tensor& token_ids_, const Tensor& logprobs_) {
  const char* op = "decoder_greedy";
  Description& d = described(op, description_);
  const DecoderStack& s = d.stack;
  check_whole(op, d);
  if (s.embedding.data == nullptr) refuse(op, "embedding and head are not described");
  const View tokens(op, "tokens", tokens_), tables(op, "block_tables", block_tables_), rows(op, "rows", rows_),
      positions(op, "positions", positions_), hidden(op, "hidden", hidden_), out(op, "out", out_),
      logits(op, "logits", logits_), token_ids(op, "token_ids", token_ids_), logprobs(op, "logprobs", logprobs_);
  const int64_t count = rows.rank(1).sizes[0];
  tokens.rank(2).typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
  tables.rank(2).size(0, tokens.sizes[0]).typed(aoti_torch_dtype_int32(), "int32").dense_from(0);
  for (const View* v : {&rows, &positions, &token_ids})
    v->rank(1).size(0, count).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  for (const View* v : {&hidden, &out})
    v->rank(2).size(0, count).size(1, s.hidden).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  logits.rank(2).size(0, count).size(1, s.head.rows).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  logprobs.rank(1).size(0, count).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  if (count == 0) return;
  const int64_t width = tokens.sizes[1], max_blocks = tables.sizes[1];
  const int64_t* const row = static_cast<const int64_t*>(rows.data);
  const int64_t* const position = static_cast<const int64_t*>(positions.data);
  int32_t* const token = static_cast<int32_t*>(tokens.data);
  int64_t longest = 0;
  for (int64_t i = 0; i < count; i++) {
    if (row[i] < 0 || row[i] >= tokens.sizes[0]) refuse(op, "there is no row ", row[i]);
    if (position[i] < 0 || position[i] + 1 >= width || position[i] / s.block_size >= max_blocks)
      refuse(op, "position ", position[i], " is outside the row");
    if (position[i] >= longest) longest = position[i] + 1;
  }
  const int64_t used = (longest + s.block_size - 1) / s.block_size;
  std::vector<int32_t> starts(static_cast<size_t>(count + 1)), lengths(static_cast<size_t>(count)),
      table_rows(static_cast<size_t>(count * used));
  std::vector<int64_t> ids(static_cast<size_t>(count)), places(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) {
    const auto at = static_cast<size_t>(i);
    const int32_t* const table = static_cast<const int32_t*>(tables.data) + row[i] * max_blocks;
    starts[at + 1] = static_cast<int32_t>(i + 1);
    lengths[at] = static_cast<int32_t>(position[i] + 1);
    std::memcpy(&table_rows[static_cast<size_t>(i * used)], table, static_cast<size_t>(used) * sizeof(int32_t));
    ids[at] = token[row[i] * width + position[i]];
    places[at] = table[position[i] / s.block_size] * s.block_size + position[i] % s.block_size;
  }
  const aserve::Kernels& kernels = table(op);
  float* const x = static_cast<float*>(hidden.data);
  check(op, kernels.packed_rows({s.embedding, ids.data(), x, count}, threads()));
  if (s.embedding_factor != 1.0f)
    for (int64_t i = 0; i < count * s.hidden; i++) x[i] *= s.embedding_factor;
  aserve::DecoderArgs a = {};
  a.stack = &s;
  a.layers = d.layers;
  a.x = x;
  a.out = static_cast<float*>(out.data);
  a.positions = position;
  a.slots = places.data();
  a.query_start = starts.data();
  a.seq_lens = lengths.data();
  a.block_tables = table_rows.data();
  a.tokens = a.rows = count;
  a.max_blocks = a.table_stride = used;
  check(op, kernels.decoder(a, threads().count));
  const aserve::DType f32 = aserve::DType::f32;
  check(op, kernels.packed_linear({s.head, out.data, {count, count, s.hidden, 0}, logits.data, f32, f32}, threads()));
  int64_t* const drawn = static_cast<int64_t*>(token_ids.data);
  kernels.greedy_logprob(
      {logits.data, drawn, static_cast<float*>(logprobs.data), count, s.head.rows, s.head.rows, f32}, threads());
  for (int64_t i = 0; i < count; i++) token[row[i] * width + position[i] + 1] = static_cast<int32_t>(drawn[i]);
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
  read_rows(query_start, seq_lens, block_tables, a.tokens, s.block_size, a);
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
      "Tensor positions, Tensor(c!) hidden, Tensor(d!) out, Tensor(e!) logits, Tensor(f!) token_ids, "
      "Tensor(g!) logprobs) -> ()");
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

// Binding of the CUDA kernels to torch's stable ABI, under the key CUDA of the operations that bind_cpu.cpp
// defines: an operation's schema is written once, there. Checks shapes, dtypes, strides and devices, then hands
// pointers and the current stream to the kernels. Nothing is read from device memory and nothing waits, so every
// operation may be captured in a CUDA graph; ids, lengths and slots in device memory are trusted.
//
// Workspaces come from torch's allocator, which hands a capture memory of the graph's own pool.
//
// With ASERVE_EMULATED this is the same binding over the emulated kernels, for tensors on the CPU, under
// operations of the same schemas in the namespace aserve_emulated.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#if defined(ASERVE_EMULATED)
#define ASERVE_NAMESPACE aserve_emulated
#define ASERVE_KEY CPU
#else
#define ASERVE_NAMESPACE aserve
#define ASERVE_KEY CUDA
#define ASERVE_DEVICE_TYPE aoti_torch_device_type_cuda()
#define ASERVE_DEVICE_NAME "a CUDA device"
#include <cuda_runtime_api.h>
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "cuda/kernels.cuh"
#include "tensor_view.h"

#if !defined(ASERVE_EMULATED)
// Hazard: torch declares this only to code built with its CUDA headers, and the CPU build of torch does not define
// it. A weak reference is null there, so the library still loads and registers; with a CUDA build of torch the
// loader finds it in libtorch_cuda, which libtorch depends on. A strong one would need libtorch_cuda to load at all.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace {

namespace cuda = aserve::cuda;

// The device of an operation's tensors, current while this lives, and the stream that is current there.
class Site {
 public:
  Site(const char* op, std::initializer_list<const Tensor*> tensors) : op_(op) {
#if !defined(ASERVE_EMULATED)
    for (const Tensor* tensor : tensors) {
      const int32_t index = tensor->get_device_index();
      if (device_ >= 0 && index != device_) refuse(op, "tensors are on the devices ", device_, " and ", index);
      device_ = index;
    }
    guard_.emplace(device_);
    if (aoti_torch_get_current_cuda_stream == nullptr) refuse(op, "this torch was built without CUDA");
    // Asked for at every call: a capture and a side stream change it.
    if (aoti_torch_get_current_cuda_stream(device_, &stream_) != AOTI_TORCH_SUCCESS)
      refuse(op, "torch names no current stream of device ", device_);
#else
    (void)tensors;
#endif
  }

  void* stream() const { return stream_; }

  int64_t multiprocessors() const {
#if defined(ASERVE_EMULATED)
    return 4;
#else
    int count = 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_) != cudaSuccess)
      refuse(op_, "CUDA does not tell the number of multiprocessors of device ", device_);
    return count;
#endif
  }

  void check(int status) const {
    if (status == cuda::kUnsupported) refuse(op_, "the CUDA kernels do not serve these shapes, types or alignments");
#if defined(ASERVE_EMULATED)
    if (status != 0) refuse(op_, "the emulated launch failed");
#else
    if (status != 0) refuse(op_, "CUDA: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
#endif
  }

 private:
  const char* op_;
  int32_t device_ = -1;
  void* stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

cuda::DType float_type(const View& x) {
  switch (x.storage()) {
    case DType::bf16:
      return cuda::DType::bf16;
    case DType::f16:
      return cuda::DType::f16;
    default:
      return cuda::DType::f32;
  }
}

cuda::DType cache_type(const View& x) {
  if (x.type == aoti_torch_dtype_float8_e4m3fn()) return cuda::DType::e4m3;
  if (x.type == aoti_torch_dtype_float8_e5m2()) return cuda::DType::e5m2;
  return float_type(x);
}

cuda::Rows cuda_rows(const View& x) {
  const aserve::Rows rows = rows_of(x);
  return {rows.count, rows.inner, rows.inner_stride, rows.outer_stride};
}

const int64_t* int64s(const View& x) {
  x.typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  return static_cast<const int64_t*>(x.data);
}

const int32_t* int32s(const View& x, int64_t dense_from) {
  x.typed(aoti_torch_dtype_int32(), "int32").dense_from(dense_from);
  return static_cast<const int32_t*>(x.data);
}

Tensor workspace(const Tensor& like, int64_t count) {
  const int64_t size[] = {count}, stride[] = {1};
  int32_t type = -1;
  AtenTensorHandle made = nullptr;
  if (aoti_torch_get_device_type(like.get(), &type) != AOTI_TORCH_SUCCESS ||
      aoti_torch_empty_strided(1, size, stride, aoti_torch_dtype_float32(), type, like.get_device_index(), &made) !=
          AOTI_TORCH_SUCCESS)
    throw std::runtime_error("aserve: no memory for a workspace of " + std::to_string(count) + " floats");
  return Tensor(made);
}

void norm(const char* op, const Site& site, const Tensor& x_, const Tensor* residual_, const Tensor& weight_,
          double eps, const Tensor& out_, const Tensor* total_) {
  const View x(op, "x", x_), weight(op, "weight", weight_), out(op, "out", out_);
  cuda::NormArgs a = {};
  a.x_rows = cuda_rows(x);
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
    a.residual_rows = cuda_rows(residual);
    a.residual = residual.data;
    a.total = total.data;
  }
  a.x = x.data;
  a.weight = weight.data;
  a.out = out.data;
  a.eps = static_cast<float>(eps);
  a.out_scale = 1.0f;
  a.dtype = a.out_dtype = float_type(x);
  a.weight_dtype = float_type(weight);
  site.check(aserve_cuda_norm(&a, site.stream()));
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  const char* op = "rms_norm";
  norm(op, Site(op, {&x, &weight, &out}), x, nullptr, weight, eps, out, nullptr);
}

void fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                        const Tensor& out, const Tensor& total) {
  const char* op = "fused_add_rms_norm";
  norm(op, Site(op, {&x, &residual, &weight, &out, &total}), x, &residual, weight, eps, out, &total);
}

// The caches into args that name them as rotary and attention do. 8-bit caches hold the values themselves: these
// schemas carry no scale.
template <typename Args>
void read_cache(const View& k, const View& v, int64_t kv_heads, int64_t head_size, Args& a) {
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
  a.cache_dtype = cache_type(k);
  a.k_scale = a.v_scale = 1.0f;
}

cuda::RotaryArgs rotary_args(const View& q, const View& k, const View& positions, const View& cos_sin,
                             bool interleaved, const View& q_out) {
  cuda::RotaryArgs a = {};
  q.rank(3).dense_from(1);
  k.rank(3).dense_from(1).size(0, q.sizes[0]).size(2, q.sizes[2]);
  check_same_type(q, k);
  check_same_type(q, q_out);
  positions.rank(1).size(0, q.sizes[0]);
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
  a.q = q.data;
  a.k = k.data;
  a.q_out = q_out.data;
  a.positions = int64s(positions);
  a.cos_sin = static_cast<const float*>(cos_sin.data);
  a.q_stride = q.strides[0];
  a.k_stride = k.strides[0];
  a.interleaved = interleaved;
  a.dtype = a.cache_dtype = float_type(q);
  a.k_scale = a.v_scale = 1.0f;
  return a;
}

void rotary_embedding(const Tensor& q_, const Tensor& k_, const Tensor& positions_, const Tensor& cos_sin_,
                      bool interleaved, const Tensor& q_out_, const Tensor& k_out_) {
  const char* op = "rotary_embedding";
  const Site site(op, {&q_, &k_, &positions_, &cos_sin_, &q_out_, &k_out_});
  const View q(op, "q", q_), k(op, "k", k_), positions(op, "positions", positions_),
      cos_sin(op, "cos_sin", cos_sin_), q_out(op, "q_out", q_out_), k_out(op, "k_out", k_out_);
  cuda::RotaryArgs a = rotary_args(q, k, positions, cos_sin, interleaved, q_out);
  same_shape(k, k_out);
  check_same_type(k, k_out);
  k_out.dense_from(0);
  a.k_out = k_out.data;
  site.check(aserve_cuda_rotary(&a, site.stream()));
}

void rope_and_store(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& positions_,
                    const Tensor& cos_sin_, bool interleaved, const Tensor& k_cache_, const Tensor& v_cache_,
                    const Tensor& slots_, const Tensor& q_out_) {
  const char* op = "rope_and_store";
  const Site site(op, {&q_, &k_, &v_, &positions_, &cos_sin_, &k_cache_, &v_cache_, &slots_, &q_out_});
  const View q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), positions(op, "positions", positions_),
      cos_sin(op, "cos_sin", cos_sin_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_),
      slots(op, "slots", slots_), q_out(op, "q_out", q_out_);
  cuda::RotaryArgs a = rotary_args(q, k, positions, cos_sin, interleaved, q_out);
  same_shape(k, v);
  check_same_type(k, v);
  v.dense_from(1);
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, a);
  slots.rank(1).size(0, a.tokens);
  a.v = v.data;
  a.v_stride = v.strides[0];
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.slots = int64s(slots);
  site.check(aserve_cuda_rotary(&a, site.stream()));
}

void store_kv(const Tensor& k_, const Tensor& v_, const Tensor& k_cache_, const Tensor& v_cache_,
              const Tensor& slots_) {
  const char* op = "store_kv";
  const Site site(op, {&k_, &v_, &k_cache_, &v_cache_, &slots_});
  const View k(op, "k", k_), v(op, "v", v_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_),
      slots(op, "slots", slots_);
  cuda::RotaryArgs a = {};
  k.rank(3).dense_from(1);
  same_shape(k, v);
  v.dense_from(1);
  check_same_type(k, v);
  a.tokens = k.sizes[0];
  a.kv_heads = k.sizes[1];
  a.head_size = k.sizes[2];
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, a);
  slots.rank(1).size(0, a.tokens);
  a.k = k.data;
  a.v = v.data;
  a.k_stride = k.strides[0];
  a.v_stride = v.strides[0];
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.slots = int64s(slots);
  a.dtype = float_type(k);
  site.check(aserve_cuda_rotary(&a, site.stream()));
}

void paged_attention(const Tensor& q_, const Tensor& k_cache_, const Tensor& v_cache_, const Tensor& query_start_,
                     const Tensor& seq_lens_, const Tensor& block_tables_, double scale, int64_t window,
                     double softcap, std::optional<Tensor> alibi_slopes_, const Tensor& out_) {
  const char* op = "paged_attention";
  const Site site(op, {&q_, &k_cache_, &v_cache_, &query_start_, &seq_lens_, &block_tables_,
                       alibi_slopes_.has_value() ? &*alibi_slopes_ : &q_, &out_});
  const View q(op, "q", q_), k_cache(op, "k_cache", k_cache_), v_cache(op, "v_cache", v_cache_),
      query_start(op, "query_start", query_start_), seq_lens(op, "seq_lens", seq_lens_),
      block_tables(op, "block_tables", block_tables_), out(op, "out", out_);
  cuda::AttentionArgs a = {};
  q.rank(3).dense_from(2);
  k_cache.rank(4);
  a.tokens = q.sizes[0];
  a.q_heads = q.sizes[1];
  a.kv_heads = k_cache.sizes[1];
  a.head_size = q.sizes[2];
  if (a.kv_heads < 1 || a.q_heads % a.kv_heads != 0)
    refuse(op, a.q_heads, " query heads do not divide among ", a.kv_heads, " KV heads");
  if (a.head_size < 8 || a.head_size > 256 || a.head_size % 8 != 0)
    refuse(op, "the head size must be a multiple of 8 from 8 to 256, is ", a.head_size);
  read_cache(k_cache, v_cache, a.kv_heads, a.head_size, a);
  if ((a.block_size & (a.block_size - 1)) != 0) refuse(op, "the block size must be a power of two, is ", a.block_size);
  same_shape(q, out);
  out.dense_from(0);
  check_same_type(q, out);
  a.rows = seq_lens.rank(1).sizes[0];
  query_start.rank(1).size(0, a.rows + 1);
  block_tables.rank(2).size(0, a.rows);
  if (window < 0) refuse(op, "window must not be negative");
  if (alibi_slopes_.has_value()) {
    const View slopes(op, "alibi_slopes", *alibi_slopes_);
    slopes.rank(1).size(0, a.q_heads).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
    a.alibi_slopes = static_cast<const float*>(slopes.data);
  }
  a.q = q.data;
  a.out = out.data;
  a.k_cache = k_cache.data;
  a.v_cache = v_cache.data;
  a.query_start = int32s(query_start, 0);
  a.seq_lens = int32s(seq_lens, 0);
  a.block_tables = int32s(block_tables, 1);
  a.table_stride = block_tables.strides[0];
  a.q_token = q.strides[0];
  a.q_head = q.strides[1];
  a.window = window;
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.dtype = float_type(q);
  if (a.tokens == 0 || a.rows == 0) return;
  // The queries of a row are known on the device only. The average sizes the grid, and rows with more are served
  // too; a step whose rows differ much is quicker as a launch for its prefill rows and one for its decode rows.
  a.max_query_len = (a.tokens + a.rows - 1) / a.rows;
  // A prefill has blocks enough. The table's width bounds the keys of a decode, and is the same in every replay.
  const bool few = a.max_query_len * (a.q_heads / a.kv_heads) <= 32;
  const int64_t most_keys = block_tables.sizes[1] * a.block_size;
  a.splits = few ? aserve_cuda_decode_splits(a.rows, a.kv_heads, most_keys, site.multiprocessors()) : 1;
  std::optional<Tensor> partial;
  if (a.splits > 1) {
    partial = workspace(q_, a.tokens * a.q_heads * a.splits * (a.head_size + 2));
    a.partial = static_cast<float*>(partial->data_ptr());
  }
  site.check(aserve_cuda_attention(&a, site.stream()));
}

void gated(const Tensor& x_, int64_t activation, const Tensor& out_) {
  const char* op = "gated";
  const Site site(op, {&x_, &out_});
  const View x(op, "x", x_), out(op, "out", out_);
  cuda::GatedArgs a = {};
  a.x_rows = cuda_rows(x);
  a.size = x.sizes[x.dims - 1] / 2;
  if (2 * a.size != x.sizes[x.dims - 1]) refuse(op, "the last dimension of x must be even");
  out.rank(x.dims).size(x.dims - 1, a.size).dense_from(0);
  for (int64_t d = 0; d + 1 < x.dims; d++) out.size(d, x.sizes[d]);
  check_same_type(x, out);
  if (activation < 0 || activation > 2) refuse(op, "unknown activation ", activation);
  a.x = x.data;
  a.out = out.data;
  a.activation = static_cast<cuda::Activation>(activation);
  a.gated = 1;
  a.dtype = float_type(x);
  site.check(aserve_cuda_activation(&a, site.stream()));
}

void greedy_logprob(const Tensor& logits_, const Tensor& token_, const Tensor& logprob_) {
  const char* op = "greedy_logprob";
  const Site site(op, {&logits_, &token_, &logprob_});
  const View logits(op, "logits", logits_), token(op, "token", token_), logprob(op, "logprob", logprob_);
  cuda::SampleArgs a = {};
  logits.rank(2).dense_from(1);
  a.rows = logits.sizes[0];
  a.size = logits.sizes[1];
  if (a.size < 1) refuse(op, "logits must have a column");
  token.rank(1).size(0, a.rows).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  logprob.rank(1).size(0, a.rows).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  if (a.rows == 0) return;
  // Two blocks for every multiprocessor where the rows alone do not give them, none of less than 2048 logits.
  const int64_t wanted = (2 * site.multiprocessors() + a.rows - 1) / a.rows, most = (a.size + 2047) / 2048;
  a.parts = wanted < most ? wanted : most;
  const Tensor partial = workspace(logits_, a.rows * a.parts * cuda::kSamplePartial);
  a.logits = logits.data;
  a.token = static_cast<int64_t*>(token.data);
  a.logprob = static_cast<float*>(logprob.data);
  a.partial = static_cast<float*>(partial.data_ptr());
  a.stride = logits.strides[0];
  a.dtype = float_type(logits);
  site.check(aserve_cuda_sample(&a, site.stream()));
}

}  // namespace

// copy_blocks and swap_blocks stay with torch: their pairs come from the host.
#define ASERVE_IMPLEMENT(space, key) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
ASERVE_IMPLEMENT(ASERVE_NAMESPACE, ASERVE_KEY) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("rope_and_store", TORCH_BOX(&rope_and_store));
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("greedy_logprob", TORCH_BOX(&greedy_logprob));
}

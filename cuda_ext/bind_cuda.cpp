// Binding of the CUDA kernels to torch's stable ABI, under the key CUDA of the operations that bind_cpu.cpp
// defines: an operation's schema is written once, there, and its shapes are checked once, in arguments.h. Pointers
// and the current stream go to the kernels. Nothing is read from device memory and nothing waits, so every
// operation but the copies of blocks, whose pairs come from the host, may be captured in a CUDA graph; ids, lengths
// and slots in device memory are trusted.
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

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

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

  const char* op() const { return op_; }
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

// arguments.h reads types by these.
void set_type(const View& x, cuda::DType& type) {
  switch (x.storage()) {
    case DType::bf16:
      type = cuda::DType::bf16;
      return;
    case DType::f16:
      type = cuda::DType::f16;
      return;
    default:
      type = cuda::DType::f32;
  }
}

void set_cache_type(const View& x, cuda::DType& type) {
  if (x.type == aoti_torch_dtype_float8_e4m3fn()) type = cuda::DType::e4m3;
  else if (x.type == aoti_torch_dtype_float8_e5m2()) type = cuda::DType::e5m2;
  else set_type(x, type);
}

}  // namespace

#include "arguments.h"

namespace {

// Bytes on the device of `like`.
Tensor workspace(const Tensor& like, int64_t bytes) {
  const int64_t size[] = {bytes}, stride[] = {1};
  int32_t type = -1;
  AtenTensorHandle made = nullptr;
  if (aoti_torch_get_device_type(like.get(), &type) != AOTI_TORCH_SUCCESS ||
      aoti_torch_empty_strided(1, size, stride, aoti_torch_dtype_uint8(), type, like.get_device_index(), &made) !=
          AOTI_TORCH_SUCCESS)
    throw std::runtime_error("aserve: no memory for a workspace of " + std::to_string(bytes) + " bytes");
  return Tensor(made);
}

void norm(const char* op, const Site& site, const Tensor& x, const Tensor* residual, const Tensor& weight,
          double eps, const Tensor& out, const Tensor* total) {
  std::optional<View> other, sum;
  if (residual != nullptr) {
    other.emplace(op, "residual", *residual);
    sum.emplace(op, "total", *total);
  }
  auto a = norm_args<cuda::NormArgs>({op, "x", x}, other ? &*other : nullptr, {op, "weight", weight}, eps,
                                     {op, "out", out}, sum ? &*sum : nullptr);
  a.out_scale = 1.0f;
  a.out_dtype = a.dtype;
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

void rotary_embedding(const Tensor& q, const Tensor& k_, const Tensor& positions, const Tensor& cos_sin,
                      bool interleaved, const Tensor& q_out, const Tensor& k_out) {
  const char* op = "rotary_embedding";
  const Site site(op, {&q, &k_, &positions, &cos_sin, &q_out, &k_out});
  const View k(op, "k", k_);
  auto a = rotary_args<cuda::RotaryArgs>({op, "q", q}, k, {op, "positions", positions}, {op, "cos_sin", cos_sin},
                                         interleaved, {op, "q_out", q_out});
  read_k_out(k, {op, "k_out", k_out}, a);
  site.check(aserve_cuda_rotary(&a, site.stream()));
}

void rope_and_store(const Tensor& q, const Tensor& k_, const Tensor& v, const Tensor& positions,
                    const Tensor& cos_sin, bool interleaved, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slots, double k_scale, double v_scale, const Tensor& q_out) {
  const char* op = "rope_and_store";
  const Site site(op, {&q, &k_, &v, &positions, &cos_sin, &k_cache, &v_cache, &slots, &q_out});
  const View k(op, "k", k_);
  auto a = rotary_args<cuda::RotaryArgs>({op, "q", q}, k, {op, "positions", positions}, {op, "cos_sin", cos_sin},
                                         interleaved, {op, "q_out", q_out});
  read_stored(k, {op, "v", v}, {op, "k_cache", k_cache}, {op, "v_cache", v_cache}, {op, "slots", slots}, k_scale,
              v_scale, a);
  site.check(aserve_cuda_rotary(&a, site.stream()));
}

void store_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
              double k_scale, double v_scale) {
  const char* op = "store_kv";
  const Site site(op, {&k, &v, &k_cache, &v_cache, &slots});
  cuda::RotaryArgs a = {};
  read_stored({op, "k", k}, {op, "v", v}, {op, "k_cache", k_cache}, {op, "v_cache", v_cache}, {op, "slots", slots},
              k_scale, v_scale, a);
  site.check(aserve_cuda_rotary(&a, site.stream()));
}

void paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                     const Tensor& seq_lens, const Tensor& block_tables_, double scale, int64_t window,
                     double softcap, std::optional<Tensor> alibi_slopes, double k_scale, double v_scale,
                     int64_t max_query_len, const Tensor& out) {
  const char* op = "paged_attention";
  const Site site(op, {&q, &k_cache, &v_cache, &query_start, &seq_lens, &block_tables_,
                       alibi_slopes.has_value() ? &*alibi_slopes : &q, &out});
  std::optional<View> slopes;
  if (alibi_slopes.has_value()) slopes.emplace(op, "alibi_slopes", *alibi_slopes);
  const View queries(op, "q", q), block_tables(op, "block_tables", block_tables_);
  auto a = attention_args<cuda::AttentionArgs>(
      queries, {op, "k_cache", k_cache}, {op, "v_cache", v_cache}, {op, "query_start", query_start},
      {op, "seq_lens", seq_lens}, block_tables, scale, window, softcap, slopes, k_scale, v_scale, max_query_len,
      {op, "out", out});
  if ((a.block_size & (a.block_size - 1)) != 0) refuse(op, "the block size must be a power of two, is ", a.block_size);
  a.tokens = queries.sizes[0];
  if (a.tokens == 0 || a.rows == 0) return;
  // Sizes the grid: rows with more queries are served too, only slower. Where the host does not know, the average.
  a.max_query_len = max_query_len > 0 ? max_query_len : (a.tokens + a.rows - 1) / a.rows;
  // A prefill has blocks enough. The table's width bounds the keys of a decode, and is the same in every replay.
  const bool few = a.max_query_len * (a.q_heads / a.kv_heads) <= 32;
  const int64_t most_keys = block_tables.sizes[1] * a.block_size;
  a.splits = few ? aserve_cuda_decode_splits(a.rows, a.kv_heads, most_keys, site.multiprocessors()) : 1;
  std::optional<Tensor> partial;
  if (a.splits > 1) {
    partial = workspace(q, a.tokens * a.q_heads * a.splits * (a.head_size + 2) * static_cast<int64_t>(sizeof(float)));
    a.partial = static_cast<float*>(partial->data_ptr());
  }
  site.check(aserve_cuda_attention(&a, site.stream()));
}

void gated(const Tensor& x, int64_t activation, const Tensor& out) {
  const char* op = "gated";
  const Site site(op, {&x, &out});
  auto a = gated_args<cuda::GatedArgs>({op, "x", x}, activation, {op, "out", out});
  a.activation = static_cast<cuda::Activation>(activation);
  a.gated = 1;
  site.check(aserve_cuda_activation(&a, site.stream()));
}

void draw(const Site& site, const Tensor& logits, cuda::SampleArgs& a) {
  if (a.rows == 0) return;
  // Two blocks for every multiprocessor where the rows alone do not give them, none of less than 2048 logits.
  const int64_t wanted = (2 * site.multiprocessors() + a.rows - 1) / a.rows, most = (a.size + 2047) / 2048;
  a.parts = wanted < most ? wanted : most;
  const int64_t floats = a.rows * a.parts * cuda::kSamplePartial;
  const Tensor partial = workspace(logits, floats * static_cast<int64_t>(sizeof(float)));
  a.partial = static_cast<float*>(partial.data_ptr());
  site.check(aserve_cuda_sample(&a, site.stream()));
}

void greedy_logprob(const Tensor& logits, const Tensor& token, const Tensor& logprob) {
  const char* op = "greedy_logprob";
  const Site site(op, {&logits, &token, &logprob});
  auto a = drawn_args<cuda::SampleArgs>({op, "logits", logits}, {op, "token", token}, {op, "logprob", logprob});
  draw(site, logits, a);
}

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& seeds, const Tensor& positions,
            const Tensor& token, const Tensor& logprob) {
  const char* op = "sample";
  const Site site(op, {&logits, &temperature, &seeds, &positions, &token, &logprob});
  auto a = drawn_args<cuda::SampleArgs>({op, "logits", logits}, {op, "token", token}, {op, "logprob", logprob});
  read_draw({op, "temperature", temperature}, {op, "seeds", seeds}, {op, "positions", positions}, a);
  draw(site, logits, a);
}

void penalties(const Tensor& logits, const Tensor& starts, const Tensor& ids, const Tensor& counts,
               const Tensor& repetition, const Tensor& frequency, const Tensor& presence) {
  const char* op = "penalties";
  const Site site(op, {&logits, &starts, &ids, &counts, &repetition, &frequency, &presence});
  const auto a = penalty_args<cuda::PenaltyArgs>(
      {op, "logits", logits}, {op, "starts", starts}, {op, "ids", ids}, {op, "counts", counts},
      {op, "repetition", repetition}, {op, "frequency", frequency}, {op, "presence", presence});
  if (a.rows == 0) return;
  site.check(aserve_cuda_penalties(&a, site.stream()));
}

// Addresses at which a kernel finds the sides of a cache: on the device, or in pinned host memory.
int64_t reached(const View& side) {
#if !defined(ASERVE_EMULATED)
  if (side.device != ASERVE_DEVICE_TYPE) {
    cudaPointerAttributes about = {};
    if (side.sizes[0] > 0 && (cudaPointerGetAttributes(&about, side.data) != cudaSuccess ||
                              about.type != cudaMemoryTypeHost || about.devicePointer == nullptr))
      refuse(side.op, side.name, " must be on ", ASERVE_DEVICE_NAME, " or in pinned host memory");
    return reinterpret_cast<int64_t>(about.devicePointer);
  }
#endif
  return reinterpret_cast<int64_t>(side.data);
}

// Hazard: read by the copy before it returns, but only because the memory is pageable; pinned it would have to live
// until the copy is done.
void upload(const Site& site, void* target, const std::vector<int64_t>& values) {
  const size_t bytes = values.size() * sizeof(int64_t);
#if defined(ASERVE_EMULATED)
  (void)site;
  std::memcpy(target, values.data(), bytes);
#else
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  site.check(cudaStreamIsCapturing(static_cast<cudaStream_t>(site.stream()), &capturing));
  if (capturing != cudaStreamCaptureStatusNone)
    refuse(site.op(), "a CUDA graph cannot hold this operation: its pairs come from the host");
  site.check(cudaMemcpyAsync(target, values.data(), bytes, cudaMemcpyHostToDevice,
                             static_cast<cudaStream_t>(site.stream())));
#endif
}

// The pairs in the order given, every layer at once. A launch copies its pairs at the same time, so that one which
// reads or writes what another before it wrote, or writes what it reads, begins the next.
void move_blocks(const char* op, const std::vector<Tensor>& sources, const std::vector<Tensor>& targets,
                 const Tensor& pairs_, bool one_cache) {
  check_sides(op, sources.size(), targets.size());
  const View pairs(op, "pairs", pairs_, aoti_torch_device_type_cpu(), "the CPU");
  const int64_t* const ids = pair_data(pairs);
  const int64_t count = pairs.sizes[0];
  if (sources.empty() || count == 0) return;
  const Tensor* device_side = nullptr;
  std::vector<int64_t> values;
  Blocks blocks;
  std::vector<int64_t> to;
  for (size_t side = 0; side < sources.size(); side++) {
    const View source(op, "a source", sources[side], View::kAnywhere, ""),
        target(op, "a target", targets[side], View::kAnywhere, "");
    const Blocks each = block_layout(source, target);
    if (side == 0) blocks = each;
    if (each.block_bytes != blocks.block_bytes || each.source_stride != blocks.source_stride ||
        each.target_stride != blocks.target_stride || each.source_blocks != blocks.source_blocks ||
        each.target_blocks != blocks.target_blocks)
      refuse(op, "the caches of all layers must have one layout");
    for (const auto& [view, tensor] : {std::pair(&source, &sources[side]), std::pair(&target, &targets[side])})
      if (device_side == nullptr && view->device == ASERVE_DEVICE_TYPE) device_side = tensor;
    values.push_back(reached(source));
    to.push_back(reached(target));
  }
  if (device_side == nullptr) refuse(op, "a source or a target must be on ", ASERVE_DEVICE_NAME);
  const Site site(op, {device_side});
  for (int64_t i = 0; i < count; i++)
    if (ids[2 * i] < 0 || ids[2 * i] >= blocks.source_blocks || ids[2 * i + 1] < 0 ||
        ids[2 * i + 1] >= blocks.target_blocks)
      refuse(op, "a block id is outside the cache");
  const int64_t sides = static_cast<int64_t>(sources.size());
  values.insert(values.end(), to.begin(), to.end());
  values.insert(values.end(), ids, ids + 2 * count);
  const Tensor held = workspace(*device_side, static_cast<int64_t>(values.size() * sizeof(int64_t)));
  int64_t* const at = static_cast<int64_t*>(held.data_ptr());
  upload(site, at, values);
  cuda::CopyArgs a = {};
  a.sources = at;
  a.targets = at + sides;
  a.sides = sides;
  a.source_stride = blocks.source_stride;
  a.target_stride = blocks.target_stride;
  a.block_bytes = blocks.block_bytes;
  std::unordered_set<int64_t> read, written;
  for (int64_t first = 0, next = 0; first < count; first = next) {
    read.clear();
    written.clear();
    for (; next < count; next++) {
      const int64_t source = ids[2 * next], target = ids[2 * next + 1];
      if (written.count(target) != 0 || (one_cache && (written.count(source) != 0 || read.count(target) != 0))) break;
      read.insert(source);
      written.insert(target);
    }
    a.pairs = at + 2 * sides + 2 * first;
    a.count = next - first;
    site.check(aserve_cuda_copy_blocks(&a, site.stream()));
  }
}

void copy_blocks(std::vector<Tensor> caches, const Tensor& pairs) {
  move_blocks("copy_blocks", caches, caches, pairs, true);
}

void swap_blocks(std::vector<Tensor> sources, std::vector<Tensor> targets, const Tensor& pairs) {
  move_blocks("swap_blocks", sources, targets, pairs, false);
}

}  // namespace

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
  m.impl("penalties", TORCH_BOX(&penalties));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks));
}

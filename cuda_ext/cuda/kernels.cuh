// The CUDA kernels as plain functions: device pointers, counts and strides in, nothing of torch.
//
// Strides are in elements. Nothing allocates, synchronises or reads device memory on the host, so every launch
// may be captured in a CUDA graph; a row count, a length or a slot that a graph's replay changes is read on the
// device. A function returns 0, a cudaError_t, or kUnsupported before anything is launched.
// Ids in device memory (block tables, slots, positions) are trusted: who fills them checks them.
#pragma once

#include <cstdint>

namespace aserve::cuda {

constexpr int kUnsupported = -1;

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, e4m3 = 3, e5m2 = 4 };
enum class Activation : int32_t { silu = 0, gelu_tanh = 1, gelu_erf = 2, relu = 3 };

// Where rows lie: row r at r / inner * outer_stride + r % inner * inner_stride.
struct Rows {
  int64_t count, inner, inner_stride, outer_stride;
};

struct NormArgs {
  const void* x;         // rows of `size`
  const void* residual;  // likewise, or null
  const void* weight;    // [size], float32 or of x's type
  void* out;             // [rows, size], contiguous; of x's type or e4m3
  void* total;           // x + residual in x's type, contiguous; null without a residual
  Rows x_rows, residual_rows;
  int64_t size;
  float eps;
  float out_scale;  // an e4m3 result holds the value / out_scale
  DType dtype, weight_dtype, out_dtype;
};

struct GatedArgs {
  const void* x;  // rows of 2 * size where gated, of size otherwise
  void* out;      // [rows, size], contiguous
  Rows x_rows;
  int64_t size;
  Activation activation;
  int32_t gated;  // out = activation(x[:size]) * x[size:]; otherwise activation(x)
  DType dtype;
};

struct RotaryArgs {
  const void* q;             // [tokens, q_heads, head_size], heads apart by head_size
  const void* k;             // [tokens, kv_heads, head_size], likewise
  const void* v;             // likewise; null where nothing is stored
  const int64_t* positions;  // [tokens]
  const float* cos_sin;      // [max_position, rotary_size]: cosines, then sines
  void* q_out;               // contiguous; null where only keys and values are stored as they are
  void* k_out;               // contiguous; null where the keys go into the cache only
  void* k_cache;             // [num_blocks, kv_heads, block_size, head_size]
  void* v_cache;             // the same strides
  const int64_t* slots;      // [tokens]; a token whose slot is negative is not stored
  int64_t tokens, q_heads, kv_heads, head_size, rotary_size;
  int64_t q_stride, k_stride, v_stride;  // from token to token
  int64_t cache_block, cache_head, cache_slot, block_size;
  float k_scale, v_scale;  // an 8-bit cache holds the value / scale
  int32_t interleaved;
  DType dtype, cache_dtype;
};

struct AttentionArgs {
  const void* q;                // [tokens, q_heads, head_size], strides q_token and q_head
  void* out;                    // [tokens, q_heads, head_size], contiguous
  const void* k_cache;          // [num_blocks, kv_heads, block_size, head_size]
  const void* v_cache;          // the same strides
  const int32_t* query_start;   // [rows + 1]
  const int32_t* seq_lens;      // [rows]
  const int32_t* block_tables;  // [rows, ...], rows apart by table_stride
  const float* alibi_slopes;    // [q_heads] or null
  float* partial;               // decode with splits > 1: [tokens, q_heads, splits, head_size + 2]
  int64_t tokens, rows, q_heads, kv_heads, head_size, q_token, q_head;
  int64_t cache_block, cache_head, cache_slot, block_size, table_stride;
  int64_t max_query_len;  // of a row: how large a grid is made. More queries are served too, only slower.
  int64_t splits;         // decode: parts of the context that blocks of their own attend to
  int64_t window;         // a query sees this many keys, itself included; 0: all before it
  float scale, softcap;   // softcap 0: none
  float k_scale, v_scale;
  DType dtype, cache_dtype;
};

struct CopyArgs {
  const int64_t* sources;  // [sides] addresses of caches, device or pinned host memory
  const int64_t* targets;  // [sides]; the same addresses for a copy inside a cache
  const int64_t* pairs;    // [count, 2] source and target block; no target is another pair's source or target
  int64_t sides, count, source_stride, target_stride, block_bytes;  // bytes
};

struct PenaltyArgs {
  void* logits;              // [rows, size], changed in place
  const int64_t* starts;     // [rows + 1] into ids and counts
  const int64_t* ids;        // distinct within a row
  const int32_t* counts;     // how often the output holds the token; 0: only the prompt does
  const float* repetition;   // [rows], 1: none
  const float* frequency;    // [rows]
  const float* presence;     // [rows]
  int64_t rows, size, stride;
  DType dtype;
};

struct SampleArgs {
  const void* logits;        // [rows, size]
  const float* temperature;  // [rows] or null; 0 or null: the greatest logit, the first of equal ones
  const int64_t* seeds;      // [rows], with a temperature
  const int64_t* positions;  // [rows], with a temperature
  int64_t* token;            // [rows]
  float* logprob;            // [rows]: of softmax(logits / temperature), of softmax(logits) where greedy
  float* partial;            // [rows, parts, kSamplePartial]
  int64_t rows, size, stride, parts;
  DType dtype;
};
constexpr int kSamplePartial = 6;

}  // namespace aserve::cuda

#define ASERVE_LAUNCHER extern "C" __attribute__((visibility("default"))) int

ASERVE_LAUNCHER aserve_cuda_norm(const aserve::cuda::NormArgs* args, void* stream);
ASERVE_LAUNCHER aserve_cuda_activation(const aserve::cuda::GatedArgs* args, void* stream);
ASERVE_LAUNCHER aserve_cuda_rotary(const aserve::cuda::RotaryArgs* args, void* stream);
ASERVE_LAUNCHER aserve_cuda_copy_blocks(const aserve::cuda::CopyArgs* args, void* stream);
// Few queries a row. Two ways: `simple` multiplies on the CUDA cores, `tensor` on the tensor cores.
ASERVE_LAUNCHER aserve_cuda_decode_simple(const aserve::cuda::AttentionArgs* args, void* stream);
ASERVE_LAUNCHER aserve_cuda_decode_tensor(const aserve::cuda::AttentionArgs* args, void* stream);
// Any number of queries a row, on the tensor cores.
ASERVE_LAUNCHER aserve_cuda_prefill(const aserve::cuda::AttentionArgs* args, void* stream);
// The one of the three that suits max_query_len, the group, dtype and head size; see attention.cu.
ASERVE_LAUNCHER aserve_cuda_attention(const aserve::cuda::AttentionArgs* args, void* stream);
ASERVE_LAUNCHER aserve_cuda_decode_splits(int64_t rows, int64_t kv_heads, int64_t max_seq_len,
                                          int64_t multiprocessors);
ASERVE_LAUNCHER aserve_cuda_penalties(const aserve::cuda::PenaltyArgs* args, void* stream);
ASERVE_LAUNCHER aserve_cuda_sample(const aserve::cuda::SampleArgs* args, void* stream);

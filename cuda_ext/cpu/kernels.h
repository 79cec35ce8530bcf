// The CPU kernels as plain functions: pointers, counts and strides in, nothing of torch.
//
// One table of functions exists per instruction-set level; `select_kernels` picks one at run time.
// Strides are in elements. Kernels allocate nothing but per-thread scratch and do not throw.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace aserve {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Runs task(context, worker) once for each worker in [0, workers), possibly at the same time.
using Task = void (*)(void* context, int worker);
struct Threads {
  int count;
  void (*run)(int workers, Task task, void* context);
};

// Where the rows of a tensor lie: row r at r / inner * outer_stride + r % inner * inner_stride.
struct Rows {
  int64_t count, inner, inner_stride, outer_stride;
  int64_t at(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

struct NormArgs {
  const void* x;         // rows of `size`
  const void* residual;  // likewise, or null
  const void* weight;    // [size]
  void* out;             // [rows, size], contiguous
  void* total;           // x + residual, contiguous; null without a residual
  Rows x_rows, residual_rows;
  int64_t size;
  float eps;
  DType dtype, weight_dtype;
};

struct RotaryArgs {
  const void* q;          // [tokens, q_heads, head_size], heads apart by head_size
  const void* k;          // [tokens, kv_heads, head_size], likewise
  const void* v;          // [tokens, kv_heads, head_size] or null: then nothing is stored
  const int64_t* positions;
  const float* cos_sin;   // [max_position, rotary_size]
  void* q_out;            // contiguous
  void* k_out;            // contiguous; null where the keys go into the cache only
  void* k_cache;          // see CacheArgs
  void* v_cache;
  const int64_t* slots;
  int64_t tokens, q_heads, kv_heads, head_size, rotary_size, max_position;
  int64_t q_stride, k_stride, v_stride;  // from token to token
  int64_t cache_block, cache_head, cache_slot, block_size, num_blocks;
  bool interleaved;
  DType dtype, cache_dtype;
};

struct StoreArgs {
  const void* k;  // [tokens, kv_heads, head_size], heads apart by head_size
  const void* v;
  void* k_cache;  // [num_blocks, kv_heads, block_size, head_size]
  void* v_cache;
  const int64_t* slots;
  int64_t tokens, kv_heads, head_size, k_stride, v_stride;
  int64_t cache_block, cache_head, cache_slot, block_size, num_blocks;
  DType dtype, cache_dtype;
};

struct AttentionArgs {
  const void* q;                // [tokens, q_heads, head_size], strides q_token and q_head
  void* out;                    // [tokens, q_heads, head_size], contiguous
  const void* k_cache;          // [num_blocks, kv_heads, block_size, head_size]
  const void* v_cache;          // same strides as k_cache
  const int32_t* query_start;   // [rows + 1]
  const int32_t* seq_lens;      // [rows]
  const int32_t* block_tables;  // [rows, max_blocks], rows apart by table_stride
  const float* alibi_slopes;    // [q_heads] or null
  int64_t rows, q_heads, kv_heads, head_size, q_token, q_head;
  int64_t cache_block, cache_head, cache_slot, block_size, num_blocks;
  int64_t max_blocks, table_stride;
  int64_t window;  // 0: none
  float scale, softcap;  // softcap 0: none
  DType dtype, cache_dtype;
};

struct GatedArgs {
  const void* x;  // rows of 2 * size
  void* out;      // [rows, size], contiguous
  Rows x_rows;
  int64_t size;
  DType dtype;
};

struct LogprobArgs {
  const void* logits;  // [rows, size]
  int64_t* token;      // [rows]: first index of the greatest logit
  float* logprob;      // [rows]: its log-probability
  int64_t rows, size, stride;
  DType dtype;
};

struct AllowedArgs {
  const float* logits;      // [rows, size]
  const uint32_t* allowed;  // [rows, words]: logit i counts if bit i % 32 of word i / 32 is set
  int64_t* token;           // [rows]: first index of the greatest logit that counts
  float* logprob;           // [rows]: its log-probability among those; not finite where none counts
  int64_t rows, size, stride, words;
};

struct LinearArgs {
  PackedWeight weight;
  const void* x;  // rows of weight.columns
  Rows x_rows;
  void* out;  // [rows, weight.rows], contiguous
  DType dtype, out_dtype;
};

struct RowsArgs {
  PackedWeight weight;
  const int64_t* ids;
  float* out;  // [count, weight.columns]
  int64_t count;
};

struct CopyArgs {
  const void* source;    // [source_blocks, ...], each block one stretch of memory
  void* target;          // likewise; may be source
  const int64_t* pairs;  // [count, 2]: source and target block, copied in this order
  int64_t count, source_blocks, target_blocks;
  int64_t source_stride, target_stride, block_bytes;  // bytes
};

// What a kernel found wrong with values that only it reads.
enum class Status : int { ok = 0, bad_block = 1, bad_slot = 2, bad_position = 3, no_memory = 4, bad_row = 5, bad_type = 6 };

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu_erf = 2 };

struct DecoderArgs;  // decoder.h

struct Kernels {
  const char* isa;
  void (*norm)(const NormArgs&, const Threads&);
  Status (*rotary)(const RotaryArgs&, const Threads&);
  Status (*store)(const StoreArgs&, const Threads&);
  Status (*attention)(const AttentionArgs&, const Threads&);
  void (*gated)(const GatedArgs&, Activation, const Threads&);
  void (*greedy_logprob)(const LogprobArgs&, const Threads&);
  void (*greedy_allowed)(const AllowedArgs&, const Threads&);
  LinearKernels linear;
  Status (*packed_linear)(const LinearArgs&, const Threads&);
  Status (*packed_rows)(const RowsArgs&, const Threads&);
  Status (*decoder)(const DecoderArgs&, int threads);
};

const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The table in use: the best level this CPU has, or the one forced by select_kernels.
// Null where the CPU has none of the levels.
const Kernels* kernels();
// name: "avx2", "avx512", or "auto". False where this CPU lacks the level or it is unknown.
bool select_kernels(const char* name);

Status copy_blocks(const CopyArgs& args);

// A buffer of at least `bytes`, 64-byte aligned, owned by the calling thread and reused by its next
// call for the same slot (0 or 1). Null when memory is short.
void* thread_scratch(size_t bytes, int slot = 0);

}  // namespace aserve

// All decoder layers of a step in one call: what describes them. See decoder.inl.
#pragma once

#include "kernels.h"

namespace aserve {

constexpr int kMaxWindows = 8;

struct DecoderLayer {
  PackedWeight q, k, v, out, gate, up, down;
  const float *input_norm, *pre_mlp_norm;            // [hidden]
  const float *post_attention_norm, *post_mlp_norm;  // [hidden], or null
  const float *q_norm, *k_norm;                      // [head_size], or null
  const float* cos_sin;                              // [max_position, rotary_size]
  int64_t max_position, rotary_size;
  float scale, softcap, eps;  // softcap 0: none
  Activation activation;
  bool interleaved;
  int window;  // index into DecoderStack::windows
  void *k_cache, *v_cache;
};

// Layers that have their widths, heads and cache layout in common.
struct DecoderStack {
  int64_t layers, hidden, q_heads, kv_heads, head_size;
  const float* final_norm;
  float final_eps;
  int num_windows;
  int64_t windows[kMaxWindows];  // 0: none
  int64_t cache_block, cache_head, cache_slot, block_size, num_blocks;  // block_size 0: caches not yet given
  DType cache_dtype;
  PackedWeight embedding, head;  // for whole greedy steps; data null: not given
  float embedding_factor;
};

struct DecoderArgs {
  const DecoderStack* stack;
  const DecoderLayer* layers;
  const float* x;  // [tokens, hidden]
  float* out;      // likewise, not x
  const int64_t* positions;     // [tokens]
  const int64_t* slots;         // [tokens]
  const int32_t* query_start;   // [rows + 1]
  const int32_t* seq_lens;      // [rows]
  const int32_t* block_tables;  // [rows, max_blocks], rows apart by table_stride
  int64_t tokens, rows, max_blocks, table_stride;
};

#ifdef ASERVE_PROFILE
// Of norms and ready activations, q k v, attention, out, gate and up, down, -, barriers.
extern uint64_t decoder_ticks[8];
#endif

}  // namespace aserve

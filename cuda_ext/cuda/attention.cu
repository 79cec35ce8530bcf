// Which attention kernel serves a step, and in how many parts a decode's keys are split.
#include "common.cuh"

// Splits that give every multiprocessor two blocks where the rows alone do not, none shorter than 256 keys. The
// same for every step of a captured graph: max_seq_len and rows are its bucket's. Results of different splits
// differ in their last bits.
ASERVE_LAUNCHER aserve_cuda_decode_splits(int64_t rows, int64_t kv_heads, int64_t max_seq_len,
                                          int64_t multiprocessors) {
  using aserve::cuda::ceil_div;
  if (rows < 1 || kv_heads < 1 || max_seq_len < 1 || multiprocessors < 1) return 1;
  const int64_t wanted = ceil_div(2 * multiprocessors, rows * kv_heads), most = ceil_div(max_seq_len, 256);
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits < 1 ? 1 : splits > 64 ? 64 : splits);
}

// The rows of a launch have up to max_query_len queries: where a step has both, its prefill rows and its decode
// rows are launches of their own, of slices of query_start, seq_lens and block_tables (query_start counts tokens
// from the beginning of q in both).
ASERVE_LAUNCHER aserve_cuda_attention(const aserve::cuda::AttentionArgs* args, void* stream) {
  using namespace aserve::cuda;
  if (args->kv_heads < 1) return kUnsupported;
  const int64_t pairs = args->max_query_len * (args->q_heads / args->kv_heads);
  const bool tensor = (args->dtype == DType::bf16 || args->dtype == DType::f16) && args->head_size % 16 == 0;
  if (!tensor || pairs <= 4) return aserve_cuda_decode_simple(args, stream);
  if (pairs <= 32 || args->splits > 1) return aserve_cuda_decode_tensor(args, stream);
  return aserve_cuda_prefill(args, stream);
}

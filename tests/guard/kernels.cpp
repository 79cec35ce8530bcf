// Runs one kernel at a time over fixed work and counts its instructions by stepping through them.
//
// The process forks: the child stops before and after the kernel, and the parent steps it from the one
// stop to the other. That needs no performance counters (virtual machines rarely have them) and no
// emulator that knows AVX-512 (valgrind does not).
//
// usage: kernels LEVEL   (avx2, avx512, avx512vnni) prints "case instructions" lines
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"
#include "quant.h"

using namespace aserve;

namespace {

void run_here(int workers, Task task, void* context) {
  for (int worker = 0; worker < workers; ++worker) task(context, worker);
}
constexpr Threads kOneThread{1, run_here};

// 64-byte aligned, filled with a pattern of small positive numbers in every format.
struct Buffer {
  explicit Buffer(size_t bytes, unsigned char fill = 0x11)
      : data(static_cast<unsigned char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    std::memset(data, fill, (bytes + 127) / 64 * 64);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  float* floats() { return reinterpret_cast<float*>(data); }
  unsigned char* data;
};

long count(const std::function<void()>& work) {
  work();  // first-use allocations and lazily bound calls are not counted
  const pid_t child = fork();
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    work();
    raise(SIGSTOP);
    _exit(0);
  }
  int status = 0;
  long steps = 0;
  waitpid(child, &status, 0);
  while (true) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0 || waitpid(child, &status, 0) != child) return -1;
    if (!WIFSTOPPED(status)) return -1;
    if (WSTOPSIG(status) == SIGSTOP) break;
    if (WSTOPSIG(status) != SIGTRAP) return -1;  // the kernel crashed
    ++steps;
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return steps;
}

void report(const std::string& name, const std::function<void()>& work) {
  const long steps = count(work);
  if (steps < 0) {
    std::fprintf(stderr, "%s: cannot be stepped through\n", name.c_str());
    std::exit(1);
  }
  std::printf("%s %ld\n", name.c_str(), steps);
  std::fflush(stdout);
}

void linear(const std::string& name, Format format, int64_t rows) {
  constexpr int64_t kColumns = 256, kOutputs = 96;
  if (!known_format(static_cast<int64_t>(format))) return;
  const LinearKernels& kernels = aserve::kernels()->linear;
  PackedWeight weight{format, kOutputs, kColumns, nullptr, nullptr};
  Buffer data(weight.groups() * group_bytes(format, kColumns));
  weight.data = data.data;
  const size_t row_bytes = ready_bytes(format, kColumns);
  Buffer x(kColumns * 4, 0x3c), ready(rows * row_bytes), out(rows * kOutputs * 4);
  Buffer scratch(scratch_bytes(format, kColumns));
  report("linear " + name + " of " + std::to_string(rows), [&] {
    for (int64_t row = 0; row < rows; ++row) {
      kernels.prepare(format, x.floats(), kColumns, 0, kColumns, ready.data + row * row_bytes);
    }
    const Upcoming nothing = {};
    kernels.multiply(weight, ready.data, rows, 0, weight.groups(), out.floats(), kOutputs, scratch.data, &nothing);
  });
}

// One sequence: `tokens` new ones, `context` in all, 4 query heads to 2 KV heads of 64, bfloat16.
void attention(const std::string& name, int64_t tokens, int64_t context) {
  constexpr int64_t kHeads = 4, kKvHeads = 2, kSize = 64, kBlock = 16;
  const int64_t blocks = (context + kBlock - 1) / kBlock;
  Buffer q(tokens * kHeads * kSize * 2, 0x3c), out(tokens * kHeads * kSize * 2);
  Buffer keys(blocks * kKvHeads * kBlock * kSize * 2, 0x3c), values(blocks * kKvHeads * kBlock * kSize * 2, 0x3c);
  const int32_t query_start[] = {0, static_cast<int32_t>(tokens)};
  const int32_t seq_lens[] = {static_cast<int32_t>(context)};
  std::vector<int32_t> table(blocks);
  for (int64_t i = 0; i < blocks; ++i) table[i] = static_cast<int32_t>(i);
  AttentionArgs args{};
  args.q = q.data;
  args.out = out.data;
  args.k_cache = keys.data;
  args.v_cache = values.data;
  args.query_start = query_start;
  args.seq_lens = seq_lens;
  args.block_tables = table.data();
  args.rows = 1;
  args.q_heads = kHeads;
  args.kv_heads = kKvHeads;
  args.head_size = kSize;
  args.q_token = kHeads * kSize;
  args.q_head = kSize;
  args.cache_block = kKvHeads * kBlock * kSize;
  args.cache_head = kBlock * kSize;
  args.cache_slot = kSize;
  args.block_size = kBlock;
  args.num_blocks = args.max_blocks = args.table_stride = blocks;
  args.scale = 0.125f;
  args.dtype = args.cache_dtype = DType::bf16;
  report("attention " + name, [&] {
    if (kernels()->attention(args, kOneThread) != Status::ok) std::abort();
  });
}

void elementwise() {
  constexpr int64_t kSize = 576;
  Buffer x(kSize * 8, 0x3c), weight(kSize * 4, 0x3c), out(kSize * 8), total(kSize * 8);
  NormArgs norm{};
  norm.x = norm.residual = x.data;
  norm.weight = weight.data;
  norm.out = out.data;
  norm.total = total.data;
  norm.x_rows = norm.residual_rows = {4, 4, kSize, 0};
  norm.size = kSize;
  norm.eps = 1e-5f;
  norm.dtype = norm.weight_dtype = DType::bf16;
  report("rms_norm of 4", [&] { kernels()->norm(norm, kOneThread); });

  GatedArgs gated{x.data, out.data, {1, 1, 2 * kSize, 0}, kSize, DType::bf16};
  report("silu_and_mul", [&] { kernels()->gated(gated, Activation::silu, kOneThread); });

  constexpr int64_t kVocabulary = 4096;
  Buffer logits(kVocabulary * 4, 0x3c);
  int64_t token = 0;
  float logprob = 0;
  LogprobArgs greedy{logits.data, &token, &logprob, 1, kVocabulary, kVocabulary, DType::f32};
  report("greedy_logprob of 4096", [&] { kernels()->greedy_logprob(greedy, kOneThread); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: kernels LEVEL\n");
    return 2;
  }
  const std::string level = argv[1];
  const bool vnni = level == "avx512vnni";
  if (!select_kernels(vnni ? "avx512" : argv[1]) || (vnni && !quant_vnni())) return 3;  // not on this CPU
  quant_allow_vnni(vnni);
  for (const int64_t rows : {1, 8, 32}) linear("q4_1", Format::q4_1, rows);
  linear("q8_0", Format::q8_0, 1);
  linear("q4_k", Format::q4_k, 1);
  linear("q6_k", Format::q6_k, 1);
  if (vnni) return 0;  // nothing else uses it
  for (const int64_t rows : {1, 32}) linear("bf16", Format::bf16, rows);
  attention("decode of 128", 1, 128);
  attention("prefill of 16", 16, 16);
  elementwise();
  return 0;
}

// What the machine can do at best: plain reads over given buffers, and peak rates of the dot products.
// Called through ctypes by aserve.bench.limits. Built for the baseline CPU; each loop names its own level.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#define ASERVE_EXPORT extern "C" __attribute__((visibility("default")))
#define ASERVE_FOR_LEVEL(level) __attribute__((target(level), noinline))

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Spins: a sleeping barrier's wake-up would be counted as reading time.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == count_) {
      arrived_.store(0);
      round_.store(round + 1);
    } else {
      while (round_.load() == round) _mm_pause();
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0}, round_{0};
};

// Runs body(thread) on `threads` threads, the caller's among them.
template <class Body>
void on_threads(int threads, const Body& body) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&body, i] { body(i); });
  body(0);
  for (std::thread& each : others) each.join();
}

// bytes: a multiple of 256.
ASERVE_FOR_LEVEL("avx512f") void read_avx512(const char* p, size_t bytes) {
  for (const char* end = p + bytes; p < end; p += 256) {
    _mm_prefetch(p + 2048, _MM_HINT_T0);
    _mm_prefetch(p + 2112, _MM_HINT_T0);
    _mm_prefetch(p + 2176, _MM_HINT_T0);
    _mm_prefetch(p + 2240, _MM_HINT_T0);
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    const __m512i c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    asm volatile("" ::"v"(a), "v"(b), "v"(c), "v"(d));
  }
}

ASERVE_FOR_LEVEL("avx2") void read_avx2(const char* p, size_t bytes) {
  for (const char* end = p + bytes; p < end; p += 128) {
    _mm_prefetch(p + 2048, _MM_HINT_T0);
    _mm_prefetch(p + 2112, _MM_HINT_T0);
    const auto* v = reinterpret_cast<const __m256i*>(p);
    const __m256i a = _mm256_loadu_si256(v), b = _mm256_loadu_si256(v + 1);
    const __m256i c = _mm256_loadu_si256(v + 2), d = _mm256_loadu_si256(v + 3);
    asm volatile("" ::"x"(a), "x"(b), "x"(c), "x"(d));
  }
}

void read(const char* p, size_t bytes) {
  static const bool wide = __builtin_cpu_supports("avx512f");
  wide ? read_avx512(p, bytes) : read_avx2(p, bytes);
}

constexpr int64_t kRounds = 2'000'000;
constexpr int kChains = 12;  // more than latency times throughput of any of these instructions

// Hazard: a loop over the chains that is not unrolled, be it only the one that sets them, keeps them in memory,
// and what is measured then is how fast a store can be read again.

ASERVE_FOR_LEVEL("avx512f") void fma_avx512() {
  __m512 x[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) x[i] = _mm512_set1_ps(1.0f);
  const __m512 m = _mm512_set1_ps(0.5f);
  for (int64_t n = 0; n < kRounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      x[i] = _mm512_fmadd_ps(x[i], m, m);
      asm volatile("" : "+v"(x[i]));
    }
  }
}

ASERVE_FOR_LEVEL("avx2,fma") void fma_avx2() {
  __m256 x[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) x[i] = _mm256_set1_ps(1.0f);
  const __m256 m = _mm256_set1_ps(0.5f);
  for (int64_t n = 0; n < kRounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      x[i] = _mm256_fmadd_ps(x[i], m, m);
      asm volatile("" : "+x"(x[i]));
    }
  }
}

ASERVE_FOR_LEVEL("avx512f,avx512bf16") void dot_bf16() {
  __m512 x[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) x[i] = _mm512_setzero_ps();
  const __m512bh m = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (int64_t n = 0; n < kRounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      x[i] = _mm512_dpbf16_ps(x[i], m, m);
      asm volatile("" : "+v"(x[i]));
    }
  }
}

ASERVE_FOR_LEVEL("avx512f,avx512vnni") void dot_int8_avx512() {
  __m512i x[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) x[i] = _mm512_setzero_si512();
  const __m512i m = _mm512_set1_epi8(1);
  for (int64_t n = 0; n < kRounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      x[i] = _mm512_dpbusd_epi32(x[i], m, m);
      asm volatile("" : "+v"(x[i]));
    }
  }
}

// Without VNNI an int8 product of 32 columns is three instructions.
ASERVE_FOR_LEVEL("avx2") void dot_int8_avx2() {
  __m256i x[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) x[i] = _mm256_setzero_si256();
  __m256i m = _mm256_set1_epi8(1);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t n = 0; n < kRounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      asm volatile("" : "+x"(m));
      x[i] = _mm256_add_epi32(x[i], _mm256_madd_epi16(_mm256_maddubs_epi16(m, m), ones));
      asm volatile("" : "+x"(x[i]));
    }
  }
}

struct Peak {
  void (*loop)();
  int operations;  // of one instruction chain's step: a product and a sum count as two
};

Peak peak_of(int kind) {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (kind == 0) return avx512 ? Peak{fma_avx512, 32} : avx2 ? Peak{fma_avx2, 16} : Peak{nullptr, 0};
  if (kind == 1) return avx512 && __builtin_cpu_supports("avx512bf16") ? Peak{dot_bf16, 64} : Peak{nullptr, 0};
  if (kind == 2) {
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return {dot_int8_avx512, 128};
    if (avx2) return {dot_int8_avx2, 64};
  }
  return {nullptr, 0};
}

}  // namespace

// Reads all the buffers with `threads` threads, each its share of every buffer, `repeats` times;
// seconds[i] is the time of round i. With sweep_bytes, every thread first walks its share of `sweep`
// (untimed), which leaves the buffers out of the caches when it is larger than they are. At most 255
// bytes at the end of a share are left out. Returns 0, or 1 for arguments that make no sense.
ASERVE_EXPORT int aserve_limits_read(const void* const* data, const size_t* bytes, size_t count, int threads,
                                     int repeats, const void* sweep, size_t sweep_bytes, double* seconds) {
  if (threads < 1 || repeats < 1 || count < 1 || !__builtin_cpu_supports("avx2")) return 1;
  Barrier barrier(threads);
  const auto share = [threads](size_t size) { return size / static_cast<size_t>(threads) / 256 * 256; };
  on_threads(threads, [&](int thread) {
    for (int round = 0; round < repeats; ++round) {
      if (sweep_bytes > 0) {
        read(static_cast<const char*>(sweep) + share(sweep_bytes) * thread, share(sweep_bytes));
      }
      barrier.wait();
      const double start = now();
      for (size_t i = 0; i < count; ++i) {
        read(static_cast<const char*>(data[i]) + share(bytes[i]) * thread, share(bytes[i]));
      }
      barrier.wait();
      if (thread == 0) seconds[round] = now() - start;
    }
  });
  return 0;
}

// Operations per second, all threads together, best of three. kind: 0 fp32 FMA, 1 bf16 dot product with
// fp32 sums, 2 int8 dot product with int32 sums. 0 where this CPU has no such instruction.
ASERVE_EXPORT double aserve_limits_peak(int kind, int threads) {
  const Peak peak = peak_of(kind);
  if (peak.loop == nullptr || threads < 1) return 0;
  double best = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    Barrier barrier(threads);
    double start = 0;
    on_threads(threads, [&](int thread) {
      barrier.wait();
      if (thread == 0) start = now();
      peak.loop();
      barrier.wait();
      if (thread == 0) {
        const double seconds = now() - start;
        best = std::max(best, double(kRounds) * kChains * peak.operations * threads / seconds);
      }
    });
  }
  return best;
}

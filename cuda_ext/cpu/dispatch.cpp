// Choice of the instruction-set level, and the per-thread scratch. Built for the baseline CPU.
#include "kernels.h"
#include "quant.h"

#include <cstdlib>
#include <cstring>

namespace aserve {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

const Kernels* best() {
  __builtin_cpu_init();
  if (has_avx512()) return avx512_kernels();
  if (has_avx2()) return avx2_kernels();
  return nullptr;
}

const Kernels*& current() {
  static const Kernels* table = best();
  return table;
}

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

const Kernels* kernels() { return current(); }

bool select_kernels(const char* name) {
  const Kernels* wanted = nullptr;
  if (std::strcmp(name, "auto") == 0) wanted = best();
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) wanted = avx2_kernels();
  if (std::strcmp(name, "avx512") == 0 && has_avx512()) wanted = avx512_kernels();
  if (wanted == nullptr) return false;
  current() = wanted;
  return true;
}

namespace {
bool vnni_allowed = true;
}

bool quant_vnni() {
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vnni") != 0);
  return has && vnni_allowed;
}

void quant_allow_vnni(bool allow) { vnni_allowed = allow; }

void* thread_scratch(size_t bytes, int slot) {
  static thread_local Scratch slots[2];
  Scratch& scratch = slots[slot];
  if (scratch.size < bytes) {
    std::free(scratch.data);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(64, rounded);
    scratch.size = scratch.data == nullptr ? 0 : rounded;
  }
  return scratch.data;
}

}  // namespace aserve

// Called through ctypes by aserve.ops.native.
extern "C" __attribute__((visibility("default"))) const char* aserve_cpu_isa() {
  const aserve::Kernels* table = aserve::kernels();
  return table == nullptr ? "none" : table->isa;
}

extern "C" __attribute__((visibility("default"))) int aserve_cpu_select(const char* name) {
  return aserve::select_kernels(name) ? 1 : 0;
}

// Called by tests, through ctypes: whether the level avx512 may use AVX512_VNNI. Returns whether it does.
extern "C" __attribute__((visibility("default"))) int aserve_cpu_vnni(int allow) {
  aserve::quant_allow_vnni(allow != 0);
  return aserve::quant_vnni() ? 1 : 0;
}

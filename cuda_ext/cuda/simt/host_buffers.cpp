#include "host_buffers.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include <sys/mman.h>
#include <unistd.h>

namespace simt {
namespace {

constexpr size_t kGuard = size_t{1} << 30;  // so far that a bad block id still ends up inside
constexpr unsigned char kCanary = 0xa5;

struct Buffer {
  char *region, *first, *data, *end;
  size_t region_bytes, bytes;
};
std::map<const void*, Buffer> buffers;

sigjmp_buf jump;
const void* fault = nullptr;

#if !defined(__SANITIZE_ADDRESS__)
struct sigaction before[2];
const int signals[2] = {SIGSEGV, SIGBUS};
stack_t stack_before;
alignas(16) char signal_stack[64 << 10];

void on_fault(int, siginfo_t* info, void*) {
  fault = info->si_addr;
  siglongjmp(jump, 1);
}
#endif

}  // namespace

// Under AddressSanitizer its own report, with the source line, says more.
FaultGuard::FaultGuard() {
#if !defined(__SANITIZE_ADDRESS__)
  stack_t mine = {};
  mine.ss_sp = signal_stack;
  mine.ss_size = sizeof signal_stack;
  sigaltstack(&mine, &stack_before);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; i++) sigaction(signals[i], &action, &before[i]);
#endif
}

FaultGuard::~FaultGuard() {
#if !defined(__SANITIZE_ADDRESS__)
  for (int i = 0; i < 2; i++) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
#endif
}

sigjmp_buf& FaultGuard::landing() { return jump; }
const void* FaultGuard::address() const { return fault; }

const char* describe(const void* address) {
  static char text[160];
  const char* at = static_cast<const char*>(address);
  for (const auto& [data, b] : buffers) {
    if (at < b.region || at >= b.region + b.region_bytes) continue;
    std::snprintf(text, sizeof text, "%lld bytes from the start of a buffer of %zu bytes",
                  static_cast<long long>(at - b.data), b.bytes);
    return text;
  }
  return "which is in no buffer";
}

}  // namespace simt

#define EXPORT __attribute__((visibility("default")))
extern "C" {

// A buffer filled with 0xff (NaN in every float format), 16-byte aligned. A gigabyte before it and behind it
// cannot be accessed; the few bytes that page and alignment leave are watched by simt_free.
EXPORT void* simt_alloc(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  void* data = nullptr;
  if (posix_memalign(&data, 16, bytes == 0 ? 1 : bytes) != 0) return nullptr;
  std::memset(data, 0xff, bytes);
  return data;
#else
  using simt::kGuard;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), padded = (bytes + 15) / 16 * 16;
  const size_t inner = (padded + page - 1) / page * page, all = inner + 2 * kGuard;
  void* region = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) return nullptr;
  simt::Buffer b = {};
  b.region = static_cast<char*>(region);
  b.region_bytes = all;
  b.first = b.region + kGuard;
  b.end = b.first + inner;
  b.data = b.end - padded;
  b.bytes = bytes;
  if (inner > 0 && mprotect(b.first, inner, PROT_READ | PROT_WRITE) != 0) return nullptr;
  std::memset(b.first, simt::kCanary, inner);
  std::memset(b.data, 0xff, bytes);
  simt::buffers[b.data] = b;
  return b.data;
#endif
}

// 0, or 1 where something was written around the buffer.
EXPORT int simt_free(void* data) {
#if defined(__SANITIZE_ADDRESS__)
  std::free(data);
  return 0;
#else
  const auto found = simt::buffers.find(data);
  if (found == simt::buffers.end()) return 1;
  const simt::Buffer b = found->second;
  int touched = 0;
  for (const char* p = b.first; p < b.end; p++)
    if ((p < b.data || p >= b.data + b.bytes) && static_cast<unsigned char>(*p) != simt::kCanary) touched = 1;
  munmap(b.region, b.region_bytes);
  simt::buffers.erase(found);
  return touched;
#endif
}
}

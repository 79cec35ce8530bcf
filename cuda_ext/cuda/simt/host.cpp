// The scheduler of the emulation: fibers, barriers, warp operations, shared memory.
#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include <sys/mman.h>

#include "host_buffers.h"
#include "host_machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

Now now;
Machine machine;

uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

namespace {

constexpr size_t kStack = 256 << 10, kPage = 4096, kGap = 256;

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* to);
asm(".text\n.hidden simt_switch\n.globl simt_switch\n.type simt_switch, @function\nsimt_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".size simt_switch, .-simt_switch\n");
void to_scheduler() { simt_switch(&now.fiber->stack_pointer, machine.main_stack); }
void to_fiber(Fiber& fiber) { simt_switch(&machine.main_stack, fiber.stack_pointer); }
#else
void to_scheduler() { swapcontext(&machine.contexts[now.fiber->id], &machine.main_context); }
void to_fiber(Fiber& fiber) { swapcontext(&machine.main_context, &machine.contexts[fiber.id]); }
#endif

void set_error(const char* format, va_list values) {
  char text[400];
  std::vsnprintf(text, sizeof text, format, values);
  char place[100] = "";
  if (now.fiber != nullptr)
    std::snprintf(place, sizeof place, "block (%u, %u, %u), thread %d: ", now.block_index.x, now.block_index.y,
                  now.block_index.z, now.fiber->id);
  std::snprintf(machine.error, sizeof machine.error, "%s%s", place, text);
  machine.failed = true;
}
void set_error(const char* format, ...) {
  va_list values;
  va_start(values, format);
  set_error(format, values);
  va_end(values);
}

void shade([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool usable) {
#if defined(__SANITIZE_ADDRESS__)
  if (usable) ASAN_UNPOISON_MEMORY_REGION(at, bytes);
  else ASAN_POISON_MEMORY_REGION(at, bytes);
#endif
}

const char* file_name(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return slash == nullptr ? where.file_name() : slash + 1;
}

void release_barrier() {
  if (machine.arrived == 0 || machine.arrived < machine.running) return;
  if (machine.running < machine.threads) {
    const Fiber* waiting = nullptr;
    for (int i = 0; i < machine.threads; i++)
      if (machine.fibers[i].waits == Waits::barrier) waiting = &machine.fibers[i];
    const char* name = file_name(waiting->where);
    const unsigned line = static_cast<unsigned>(waiting->where.line());
    if (now.fiber->waits == Waits::done) {
      set_error("ended without the barrier at %s:%u, where thread %d waits", name, line, waiting->id);
      return;
    }
    fail("is at the barrier at %s:%u, and %d threads of the block have ended", name, line,
         machine.threads - machine.running);
  }
  machine.arrived = 0;
  for (int i = 0; i < machine.threads; i++) machine.fibers[i].waits = Waits::ready;
}

[[noreturn]] void fiber_main() {
  machine.body(machine.argument);
  Fiber& mine = *now.fiber;
  Copies& copies = machine.copies[mine.id];
  if (!copies.list.empty()) fail("ended with %zu asynchronous copies never waited for", copies.list.size());
  mine.waits = Waits::done;
  machine.running--;
  release_barrier();
  to_scheduler();
  std::abort();
}

void prepare_fiber(int i) {
  Fiber& fiber = machine.fibers[i];
  const dim3 size = now.block_size;
  const auto at = static_cast<unsigned>(i);
  fiber.index = dim3(at % size.x, at / size.x % size.y, at / (size.x * size.y));
  fiber.id = i;
  fiber.waits = Waits::ready;
  machine.copies[i].list.clear();
  machine.copies[i].groups.clear();
  char* stack = machine.stacks + static_cast<size_t>(i) * kStack;
#if defined(__x86_64__)
  // The address that `ret` takes lies so that the function starts with the stack the ABI wants.
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;
#else
  getcontext(&machine.contexts[i]);
  machine.contexts[i].uc_stack.ss_sp = stack + kPage;
  machine.contexts[i].uc_stack.ss_size = kStack - kPage;
  machine.contexts[i].uc_link = nullptr;
  makecontext(&machine.contexts[i], reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

void report_deadlock() {
  for (int i = 0; i < machine.threads; i++) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.waits != Waits::warp) continue;
    now.fiber = &machine.fibers[i];
    for (int l = 0; l < 32; l++) {
      const Fiber& other = machine.fibers[(i & ~31) + l];
      if (!(fiber.mask >> l & 1) || other.waits == Waits::warp) continue;
      set_error("waits in %s at %s:%u for lane %d, which %s", fiber.operation, file_name(fiber.where),
                static_cast<unsigned>(fiber.where.line()), l,
                other.waits == Waits::done ? "has ended" : "waits at a barrier");
      return;
    }
  }
  set_error("no thread can run on");
}

void poison_shared() {
  shade(machine.shared, kMaxStatic + kMaxDynamic + kGap, true);
  std::memset(machine.shared, 0xff, machine.static_bytes);
  std::memset(now.dynamic, 0xff, machine.dynamic_bytes + kGap);
  shade(machine.shared, kMaxStatic + kMaxDynamic + kGap, false);
  for (const auto& [key, part] : machine.parts) shade(machine.shared + part.offset, part.bytes, true);
  shade(now.dynamic, machine.dynamic_bytes, true);
}

// Nothing may be written between the arrays nor behind the dynamic memory.
void check_gaps() {
  shade(machine.shared, kMaxStatic + kMaxDynamic + kGap, true);
  for (const auto& [key, part] : machine.parts)
    for (size_t i = part.bytes; i < part.bytes + 16; i++)
      if (machine.shared[part.offset + i] != 0xff) return set_error("wrote behind a static shared array");
  for (size_t i = machine.dynamic_bytes; i < machine.dynamic_bytes + kGap; i++)
    if (now.dynamic[i] != 0xff) return set_error("wrote behind the dynamic shared memory");
}

// Warps stay together, in any order, and so do the lanes of each.
void shuffle_threads() {
  int* const order = machine.order;
  for (int w = machine.threads / 32 - 1; w > 0; w--) {
    const int other = static_cast<int>(next_random() % static_cast<unsigned>(w + 1));
    std::swap_ranges(order + 32 * w, order + 32 * w + 32 * (other != w), order + 32 * other);
  }
  for (int w = 0; w < machine.threads / 32; w++)
    for (int i = 31; i > 0; i--)
      std::swap(order[32 * w + i], order[32 * w + static_cast<int>(next_random() % static_cast<unsigned>(i + 1))]);
}

void run_block() {
  machine.running = machine.threads;
  machine.arrived = 0;
  shade(machine.stacks, static_cast<size_t>(machine.threads) * kStack, true);
  poison_shared();
  for (int i = 0; i < machine.threads; i++) {
    prepare_fiber(i);
    machine.order[i] = machine.thread_order == Order::reverse ? machine.threads - 1 - i : i;
  }
  const int warps = machine.threads / 32;
  while (machine.running > 0) {
    if (machine.thread_order == Order::random) shuffle_threads();
    bool ran = false;
    for (int w = 0; w < warps; w++) {
      // One warp goes as far as it can before the next begins, which a missing barrier does not survive.
      const bool on = machine.thread_order != Order::random || (next_random() & 3) != 0;
      bool moved;
      do {
        moved = false;
        for (int j = 32 * w; j < 32 * w + 32; j++) {
          Fiber& fiber = machine.fibers[machine.order[j]];
          if (fiber.waits != Waits::ready) continue;
          now.fiber = &fiber;
          to_fiber(fiber);
          ran = moved = true;
          if (machine.failed) return;
        }
      } while (moved && on);
    }
    if (!ran) return report_deadlock();
  }
  check_gaps();
}

bool prepare(dim3 grid, dim3 block, size_t dynamic_bytes) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % 32 != 0 || block.z > 64)
    set_error("a block of %u x %u x %u threads: their number must be a multiple of 32 up to %d", block.x, block.y,
              block.z, kMaxThreads);
  else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    set_error("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  else if (dynamic_bytes > kMaxDynamic)
    set_error("%zu bytes of dynamic shared memory, %zu are the most", dynamic_bytes, kMaxDynamic);
  if (machine.failed) return false;
  if (machine.stacks == nullptr) {
    const size_t bytes = kMaxThreads * kStack;
    machine.stacks = static_cast<char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int i = 0; i < kMaxThreads; i++) mprotect(machine.stacks + static_cast<size_t>(i) * kStack, kPage, PROT_NONE);
    machine.shared = static_cast<unsigned char*>(std::aligned_alloc(256, kMaxStatic + kMaxDynamic + kGap));
  }
  machine.threads = static_cast<int>(threads);
  machine.dynamic_bytes = dynamic_bytes;
  machine.static_bytes = 0;
  machine.parts.clear();
  now.block_size = block;
  now.grid_size = grid;
  now.dynamic = machine.shared + kMaxStatic;
  return true;
}

void run_grid(dim3 grid) {
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  // A step that shares no factor with the count visits every block once.
  uint64_t step = 1, at = 0;
  if (machine.thread_order == Order::reverse) step = blocks - 1;
  if (machine.thread_order == Order::random)
    do step = next_random() % blocks + 1;
    while (std::gcd(step, blocks) != 1);
  for (uint64_t i = 0; i < blocks && !machine.failed; i++) {
    at = (at + step) % blocks;
    now.block_index = dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                           static_cast<unsigned>(at / grid.x / grid.y));
    run_block();
    now.fiber = nullptr;
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  set_error(format, values);
  va_end(values);
  to_scheduler();
  std::abort();
}

int run(dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*), void* argument) {
  const std::scoped_lock alone(machine.one_at_a_time);
  machine.failed = false;
  machine.error[0] = 0;
  now.fiber = nullptr;
  machine.body = body;
  machine.argument = argument;
  if (!prepare(grid, block, dynamic_bytes)) return kFault;
  {
    FaultGuard guard;
    if (sigsetjmp(guard.landing(), 1) == 0) {
      run_grid(grid);
    } else {
      const char* at = reinterpret_cast<const char*>(guard.address());
      const bool stack = at >= machine.stacks && at < machine.stacks + kMaxThreads * kStack;
      if (stack) set_error("its stack is full");
      else set_error("accessed %p, %s", guard.address(), describe(guard.address()));
    }
  }
  now.fiber = nullptr;
  return machine.failed ? kFault : 0;
}

void block_barrier(Where where) {
  Fiber& mine = *now.fiber;
  mine.waits = Waits::barrier;
  mine.where = where;
  if (machine.arrived > 0)
    for (int i = 0; i < machine.threads; i++) {
      const Fiber& other = machine.fibers[i];
      if (other.waits != Waits::barrier || i == mine.id) continue;
      if (other.where.line() != where.line())
        fail("is at the barrier at %s:%u while thread %d is at the one at line %u", file_name(where),
             static_cast<unsigned>(where.line()), i, static_cast<unsigned>(other.where.line()));
      break;
    }
  machine.arrived++;
  release_barrier();
  while (mine.waits != Waits::ready) to_scheduler();
}

void warp_operation(const char* name, uint32_t mask, void* lane, Combine combine, Where where) {
  Fiber& mine = *now.fiber;
  const int bit = mine.id & 31;
  Fiber* warp = machine.fibers + (mine.id & ~31);
  if (!(mask >> bit & 1)) fail("%s: the mask %08x does not name this lane", name, mask);
  mine.waits = Waits::warp;
  mine.operation = name;
  mine.mask = mask;
  mine.lane = lane;
  mine.where = where;
  void* lanes[32];
  for (int l = 0; l < 32; l++) {
    lanes[l] = nullptr;
    if (!(mask >> l & 1)) continue;
    const Fiber& other = warp[l];
    if (other.waits == Waits::done)
      fail("%s at %s:%u: lane %d has ended", name, file_name(where), static_cast<unsigned>(where.line()), l);
    if (other.waits != Waits::warp) {
      while (mine.waits != Waits::ready) to_scheduler();
      return;
    }
    if (other.operation != name || other.mask != mask || other.where.line() != where.line())
      fail("%s with mask %08x at %s:%u meets lane %d in %s with mask %08x at line %u", name, mask, file_name(where),
           static_cast<unsigned>(where.line()), l, other.operation, other.mask,
           static_cast<unsigned>(other.where.line()));
    lanes[l] = other.lane;
  }
  combine(lanes, mask);
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) warp[l].waits = Waits::ready;
}

void* static_shared(const void* key, size_t bytes) {
  const auto found = machine.parts.find(key);
  if (found != machine.parts.end()) return machine.shared + found->second.offset;
  const Part part = {machine.static_bytes, bytes};
  const size_t with_gap = (bytes + 31) / 16 * 16;
  if (part.offset + with_gap > kMaxStatic) fail("static shared arrays take more than %zu bytes", kMaxStatic);
  machine.static_bytes += with_gap;
  machine.parts.emplace(key, part);
  shade(machine.shared + part.offset, with_gap, true);
  std::memset(machine.shared + part.offset, 0xff, with_gap);
  shade(machine.shared + part.offset + bytes, with_gap - bytes, false);
  return machine.shared + part.offset;
}

}  // namespace simt

extern "C" {

#define EXPORT __attribute__((visibility("default")))
// The last launch's fault in words, "" after one that went well.
EXPORT const char* simt_error() { return simt::machine.error; }
// order: 0 forward, 1 reverse, 2 random from `seed`, which is not 0.
EXPORT void simt_order(int order, uint64_t seed) {
  simt::machine.thread_order = static_cast<simt::Order>(order);
  simt::machine.random = seed;
}
// Rows that ldmatrix read from a bank in use, in all launches so far.
EXPORT int64_t simt_conflicts() { return simt::machine.conflicts; }
EXPORT void simt_forget_conflicts(int64_t count) { simt::machine.conflicts = count; }
}

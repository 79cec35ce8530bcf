// What the emulation's own files share.
#pragma once

#include <mutex>
#include <unordered_map>
#include <vector>

#include "host_threads.cuh"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Copy {
  unsigned char* shared;
  const void* global;
  bool real;
};
struct Copies {
  std::vector<Copy> list;
  std::vector<size_t> groups;  // how many of the list each committed group ends with
};
struct Part {
  size_t offset, bytes;
};

struct Machine {
  std::mutex one_at_a_time;
  Fiber fibers[kMaxThreads];
  Copies copies[kMaxThreads];
  int order[kMaxThreads];
  int threads = 0, running = 0, arrived = 0;
  char* stacks = nullptr;
  unsigned char* shared = nullptr;  // static arrays, then dynamic memory, gaps between them
  size_t static_bytes = 0, dynamic_bytes = 0;
  std::unordered_map<const void*, Part> parts;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool failed = false;
  char error[512] = "";
  Order thread_order = Order::forward;
  uint64_t random = 1;
  int64_t conflicts = 0;
#if !defined(__x86_64__)
  ucontext_t main_context, contexts[kMaxThreads];
#else
  void* main_stack = nullptr;
#endif
};
extern Machine machine;
uint64_t next_random();

}  // namespace simt

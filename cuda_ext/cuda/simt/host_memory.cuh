// Memory of the emulation: aligned accesses, atomics, asynchronous copies.
#pragma once

#include "host_threads.cuh"

namespace simt {

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("an access of %zu bytes at %p is not aligned", bytes, p);
}
void copy_later(void* shared, const void* global, bool real);
void copies_commit();
void copies_wait(int groups_left);

}  // namespace simt

inline uint4 load16(const void* p) {
  simt::check_aligned(p, 16);
  return *static_cast<const uint4*>(p);
}
inline uint2 load8(const void* p) {
  simt::check_aligned(p, 8);
  return *static_cast<const uint2*>(p);
}
inline void store16(void* p, uint4 x) {
  simt::check_aligned(p, 16);
  *static_cast<uint4*>(p) = x;
}
inline void store8(void* p, uint2 x) {
  simt::check_aligned(p, 8);
  *static_cast<uint2*>(p) = x;
}

template <typename T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = old + x;
  return old;
}
template <typename T>
T atomicMax(T* p, T x) {
  const T old = *p;
  if (x > old) *p = x;
  return old;
}
template <typename T>
T atomicExch(T* p, T x) {
  const T old = *p;
  *p = x;
  return old;
}
template <typename T>
T atomicCAS(T* p, T expected, T x) {
  const T old = *p;
  if (old == expected) *p = x;
  return old;
}

inline void copy_async16(void* shared, const void* global, bool real) { simt::copy_later(shared, global, real); }
inline void copy_async_commit() { simt::copies_commit(); }
template <int N>
void copy_async_wait() {
  simt::copies_wait(N);
}

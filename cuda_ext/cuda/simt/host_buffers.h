// Global memory of the emulation: buffers whose surroundings cannot be touched, and the faults of who tries.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstddef>

namespace simt {

// While it lives, a bad access jumps to landing() instead of ending the process.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;
  sigjmp_buf& landing();
  const void* address() const;
};

// Where an address lies in relation to the buffers there are.
const char* describe(const void* address);

}  // namespace simt

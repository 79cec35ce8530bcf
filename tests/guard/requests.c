/* Callgrind's client requests as functions that ctypes can call. */
#include <valgrind/callgrind.h>

void guard_start(void) {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

void guard_dump(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}

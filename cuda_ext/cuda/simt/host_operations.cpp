// Asynchronous copies and ldmatrix of the emulation.
#include <cstring>

#include "host_machine.h"
#include "host_memory.cuh"
#include "host_warp.cuh"

namespace simt {
namespace {

void copy_now(const Copy& copy) {
  if (copy.real) std::memcpy(copy.shared, copy.global, 16);
  else std::memset(copy.shared, 0, 16);
}

// Each 8 rows of a matrix must lie in different banks.
void count_conflicts(void* const lanes[32]) {
  for (int m = 0; m < 4; m++) {
    unsigned seen = 0;
    for (int l = 0; l < 8; l++)
      seen |= 1u << (reinterpret_cast<uintptr_t>(static_cast<const LoadLane*>(lanes[8 * m + l])->row) / 16 % 8);
    machine.conflicts += 8 - __builtin_popcount(seen);
  }
}

}  // namespace

void copy_later(void* shared, const void* global, bool real) {
  check_aligned(shared, 16);
  auto* target = static_cast<unsigned char*>(shared);
  if (target < machine.shared || target + 16 > now.dynamic + machine.dynamic_bytes)
    fail("copies asynchronously to %p, outside shared memory", shared);
  if (real) check_aligned(global, 16);
  Copies& mine = machine.copies[now.fiber->id];
  const Copy copy = {target, global, real};
  // Hardware copies at any time up to the wait: at once in one order, as late as can be in another.
  const bool at_once = machine.thread_order == Order::reverse ||
                       (machine.thread_order == Order::random && (next_random() & 1) != 0);
  if (at_once) copy_now(copy);
  else std::memset(target, 0xff, 16);
  mine.list.push_back(copy);
}

void copies_commit() {
  Copies& mine = machine.copies[now.fiber->id];
  mine.groups.push_back(mine.list.size());
}

void copies_wait(int groups_left) {
  Copies& mine = machine.copies[now.fiber->id];
  const auto left = static_cast<size_t>(groups_left);
  if (mine.groups.size() <= left) return;
  const size_t over = mine.groups.size() - left, landed = mine.groups[over - 1];
  for (size_t i = 0; i < landed; i++) copy_now(mine.list[i]);
  mine.list.erase(mine.list.begin(), mine.list.begin() + static_cast<ptrdiff_t>(landed));
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<ptrdiff_t>(over));
  for (size_t& end : mine.groups) end -= landed;
}

void load_matrices(const char* name, LoadLane lane, bool transposed, Where where) {
  check_aligned(lane.row, 16);
  const auto* row = static_cast<const unsigned char*>(lane.row);
  if (row < machine.shared || row + 16 > now.dynamic + machine.dynamic_bytes)
    fail("%s reads %p, outside shared memory", name, lane.row);
  const auto straight = [](void* const lanes[32], uint32_t) {
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 4; m++) {
        const auto* from = static_cast<const LoadLane*>(lanes[8 * m + l / 4])->row;
        std::memcpy(&static_cast<LoadLane*>(lanes[l])->r[m], static_cast<const char*>(from) + l % 4 * 4, 4);
      }
    count_conflicts(lanes);
  };
  const auto across = [](void* const lanes[32], uint32_t) {
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int e = 0; e < 2; e++) {
          const auto* from = static_cast<const LoadLane*>(lanes[8 * m + l % 4 * 2 + e])->row;
          std::memcpy(&pair[e], static_cast<const char*>(from) + l / 4 * 2, 2);
        }
        static_cast<LoadLane*>(lanes[l])->r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    count_conflicts(lanes);
  };
  if (transposed) warp_operation(name, 0xffffffffu, &lane, across, where);
  else warp_operation(name, 0xffffffffu, &lane, straight, where);
}

}  // namespace simt

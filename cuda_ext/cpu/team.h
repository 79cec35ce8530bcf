// The threads that kernels run on.
//
// A team lives as long as the process and is made on first use; its threads are named aserve-kernel-1, 2,
// ... and pinned to nothing. The thread that calls is member 0 of a region. After a region the others
// wait for the next one: awake for a moment, as the next operation of a step follows soon, giving way to
// whoever else wants the core; then asleep.
//
// One region runs at a time. A call that comes while another thread's region runs, or from inside a
// region, is run by its caller alone: waiting would only trade places, the cores are taken either way.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aserve {

struct Team;

class Member {
 public:
  const int index;  // 0 .. count - 1
  const int count;  // of the members of this region

  // A barrier: returns once every member of the region has come, and shows what each wrote before. While it waits
  // it fetches so many bytes from `next`, what the member reads afterwards, into its second-level cache.
  void sync(const void* next = nullptr, size_t bytes = 0);

 private:
  Member(int index, int count, Team* team) : index(index), count(count), team_(team) {}
  Team* const team_;
  friend struct Team;
};

// Runs task(context, member) once for each member of a region. There are `wanted` members or fewer: one
// where another region is running, and as many as the system gave threads for. Returns when all are done.
// A task must not throw.
using TeamTask = void (*)(void* context, Member& member);
void team_run(int wanted, TeamTask task, void* context);

// Runs task(context, worker) once for each worker in [0, workers), on at most so many members.
void team_workers(int workers, void (*task)(void* context, int worker), void* context);

}  // namespace aserve

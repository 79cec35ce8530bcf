#include "team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>

namespace aserve {
namespace {

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

constexpr int kMaxMembers = 256;

// A barrier's partner is late by a few microseconds, or has lost its core for milliseconds. Where spinning
// was in vain the next spin is shorter, where it was not, longer: on a crowded machine it would only take
// time from the partner. Every so often a long one is tried, or two members that both sleep, each late by
// the time it takes to wake, would go on so for ever.
constexpr int64_t kBarrierSpin = 50'000, kLeastSpin = 2'000;  // nanoseconds
constexpr uint32_t kTryEvery = 16;                            // waits
// Between the operations of a step lie some 10 to 100 us of Python, and about as much between steps.
constexpr int64_t kIdleSpin = 200'000;
constexpr int64_t kIdleAlone = 20'000;  // of them without offering the core to others

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

void futex_wait(Word& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake(Word& word, int count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// Memory to be fetched while polling.
struct Fetch {
  const char* next;
  const char* end;
};

// Waits until word is no longer `value`: polls for spin nanoseconds, after `alone` of them with
// sched_yield in between, then sleeps. `sleepers` counts who sleeps, for wake. True if it did not sleep.
bool wait_change(const Word& polled, uint32_t value, int64_t spin, int64_t alone, Word& sleepers,
                 Fetch fetch = {nullptr, nullptr}) {
  Word& word = const_cast<Word&>(polled);
  if (spin > 0) {
    int64_t start = 0, spent = 0;
    while (spent < spin) {
      for (int i = 0; i < 24; i++) {
        if (word.load(std::memory_order_acquire) != value) return true;
        if (fetch.next < fetch.end) {
          for (int line = 0; line < 4; line++) _mm_prefetch(fetch.next + 64 * line, _MM_HINT_T1);
          fetch.next += 256;
        } else {
          _mm_pause();
        }
      }
      if (spent > alone) sched_yield();
      const int64_t time = now();
      if (start == 0) start = time;
      spent = time - start;
    }
  }
  // Together with wake: whoever changes the word sees this sleeper, or the futex sees the change.
  sleepers.fetch_add(1);
  while (word.load() == value) futex_wait(word, value);
  sleepers.fetch_sub(1);
  return false;
}

void wake(Word& word, const Word& sleepers) {
  if (sleepers.load() > 0) futex_wake(word, kMaxMembers);
}

int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return kMaxMembers;  // more CPUs than a cpu_set_t holds
  return CPU_COUNT(&set);
}

}  // namespace

struct Team {
  struct alignas(64) Slot {
    Word region{0};  // changes when a region for this member begins
    Word sleepers{0};
    Team* team = nullptr;
    int index = 0;
    int64_t patience = kBarrierSpin;  // of the member, for its next spin
    uint32_t waits = 0;
  };

  std::atomic<bool> busy{false};
  int threads = 0;  // made so far; slots 1 .. threads have one
  int count = 0;    // of the region's members
  bool spins = true;
  TeamTask task = nullptr;
  void* context = nullptr;
  alignas(64) Word arrived{0};
  alignas(64) Word phase{0};
  alignas(64) Word phase_sleepers{0};
  alignas(64) Word working{0};  // members but the first that have not finished
  alignas(64) Word working_sleepers{0};
  Slot slots[kMaxMembers];

  static Member member(int index, int count, Team* team) { return {index, count, team}; }

  // Waits for another member of the region.
  void wait_member(int index, const Word& word, uint32_t value, Word& sleepers, Fetch fetch = {nullptr, nullptr}) {
    Slot& slot = slots[index];
    const bool attempt = ++slot.waits % kTryEvery == 0;
    const int64_t spin = attempt ? kBarrierSpin : slot.patience;
    if (wait_change(word, value, spins ? spin : 0, spin, sleepers, fetch)) {
      slot.patience = std::min(kBarrierSpin, 2 * spin);
    } else if (!attempt) {
      slot.patience = std::max(kLeastSpin, spin / 2);
    }
  }

  void sync(int index, Fetch fetch) {
    // The phase cannot change before this member has come.
    const uint32_t before = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(count)) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(before + 1);
      wake(phase, phase_sleepers);
    } else {
      wait_member(index, phase, before, phase_sleepers, fetch);
    }
  }

  static void* serve(void* data) {
    Slot& slot = *static_cast<Slot*>(data);
    Team& team = *slot.team;
    uint32_t seen = 0;
    bool spins = true;
    while (true) {
      wait_change(slot.region, seen, spins ? kIdleSpin : 0, kIdleAlone, slot.sleepers);
      seen++;
      spins = team.spins;
      Member self = member(slot.index, team.count, &team);
      team.task(team.context, self);
      // Past this line the next region may begin.
      if (team.working.fetch_sub(1) == 1) wake(team.working, team.working_sleepers);
    }
    return nullptr;
  }

  // Threads until there are `wanted` members, or as many as the system gives.
  int grow(int wanted) {
    while (threads + 1 < wanted) {
      Slot& slot = slots[threads + 1];
      slot.team = this;
      slot.index = threads + 1;
      // Signals are for the threads of Python.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      pthread_t thread;
      const int error = pthread_create(&thread, nullptr, serve, &slot);
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (error != 0) break;
      char name[16];  // as long as the system allows
      std::snprintf(name, sizeof(name), slot.index < 10 ? "aserve-kernel-%d" : "aserve-kern-%d", slot.index);
      pthread_setname_np(thread, name);
      pthread_detach(thread);
      threads++;
    }
    return threads + 1 < wanted ? threads + 1 : wanted;
  }

  void run(int members, TeamTask region_task, void* region_context) {
    // Spinning would keep the core from the very member waited for where they are more than the cores.
    if (members != count) spins = members <= usable_cpus();
    count = members;
    task = region_task;
    context = region_context;
    working.store(static_cast<uint32_t>(members - 1), std::memory_order_relaxed);
    for (int i = 1; i < members; i++) {
      slots[i].region.fetch_add(1);
      wake(slots[i].region, slots[i].sleepers);
    }
    Member self = member(0, members, this);
    task(context, self);
    for (uint32_t left = working.load(std::memory_order_acquire); left != 0;
         left = working.load(std::memory_order_acquire))
      wait_member(0, working, left, working_sleepers);
  }
};

void Member::sync(const void* next, size_t bytes) {
  const char* const begin = static_cast<const char*>(next);
  if (count > 1) team_->sync(index, {begin, begin + bytes});
}

namespace {

// Never freed: its threads may be asleep in it while the process exits.
std::atomic<Team*> the_team{nullptr};

// A forked child has the memory but not the threads; it leaves the old team behind and makes its own.
void forget_team() { the_team.store(nullptr); }

Team* team() {
  Team* found = the_team.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_team);
  Team* fresh = registered == 0 ? new (std::nothrow) Team : nullptr;
  if (fresh == nullptr) return nullptr;
  if (the_team.compare_exchange_strong(found, fresh)) return fresh;
  delete fresh;
  return found;
}

}  // namespace

void team_run(int wanted, TeamTask task, void* context) {
  if (wanted > kMaxMembers) wanted = kMaxMembers;
  Team* const all = wanted > 1 ? team() : nullptr;
  if (all != nullptr && !all->busy.exchange(true, std::memory_order_acquire)) {
    const int members = all->grow(wanted);
    if (members > 1) {
      all->run(members, task, context);
      all->busy.store(false, std::memory_order_release);
      return;
    }
    all->busy.store(false, std::memory_order_release);
  }
  Member self = Team::member(0, 1, all);
  task(context, self);
}

void team_workers(int workers, void (*task)(void* context, int worker), void* context) {
  struct Call {
    int workers;
    void (*task)(void*, int);
    void* context;
  } call = {workers, task, context};
  const auto share = [](void* data, Member& member) {
    const Call& c = *static_cast<Call*>(data);
    for (int worker = member.index; worker < c.workers; worker += member.count) c.task(c.context, worker);
  };
  team_run(workers, share, &call);
}

}  // namespace aserve

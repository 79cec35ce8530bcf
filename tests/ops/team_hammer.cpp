// Drives the team of threads: team_hammer CHECK, exit status 0 where it holds. Built by test_team.py.
//   sums | barriers | callers | nested | fork | names | shares
//   times COUNT: prints the nanoseconds of an empty region and of a barrier
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "../../cuda_ext/cpu/team.h"

using aserve::Member;

namespace {

int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "../../cuda_ext/cpu/decoder_share.inl"

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  _exit(1);
}

template <typename F>
void run(int count, F body) {
  aserve::team_run(count, [](void* data, Member& member) { (*static_cast<F*>(data))(member); }, &body);
}

// Plain memory, written by one member and read by all: wrong or a data race where a region leaks.
void sums(int regions, int count, std::vector<long>& cells) {
  for (int r = 0; r < regions; r++) {
    std::atomic<int> came{0}, members{0};
    run(count, [&](Member& m) {
      if (m.count > count || m.index >= m.count) fail("a member outside the region");
      for (size_t i = static_cast<size_t>(m.index); i < cells.size(); i += static_cast<size_t>(m.count)) cells[i]++;
      came++;
      members = m.count;
    });
    if (came != members) fail("a region returned before its members");
  }
}

void barriers(int regions, int steps, int count) {
  std::vector<long> cells(64 * 16);
  for (int r = 0; r < regions; r++)
    run(count, [&](Member& m) {
      for (int s = 0; s < steps; s++) {
        cells[static_cast<size_t>(m.index) * 16] = r * steps + s;
        m.sync();
        for (int i = 0; i < m.count; i++)
          if (cells[static_cast<size_t>(i) * 16] != r * steps + s) fail("a barrier let a member through");
        m.sync();
      }
    });
}

void check_cells(const std::vector<long>& cells, long wanted) {
  for (long cell : cells)
    if (cell != wanted) fail("an index ran too often or not at all");
}

void callers() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([t] {
      std::vector<long> cells(37);
      sums(3000, 1 + t % 3 + 1, cells);
      check_cells(cells, 3000);
    });
  for (std::thread& thread : threads) thread.join();
}

void nested() {
  std::atomic<int> inner{0};
  run(3, [&](Member& m) {
    run(3, [&](Member& alone) {
      if (alone.count != 1) fail("a region within a region has members");
      inner++;
    });
    m.sync();
    if (inner != m.count) fail("a region within a region was lost");
  });
  std::vector<int> done(10);
  aserve::team_workers(10, [](void* data, int worker) { static_cast<int*>(data)[worker]++; }, done.data());
  for (int times : done)
    if (times != 1) fail("a worker ran too often or not at all");
}

void forked() {
  std::vector<long> cells(11);
  sums(10, 3, cells);
  for (int i = 0; i < 5; i++) {
    const pid_t child = fork();
    if (child == 0) {
      std::vector<long> own(11);
      sums(100, 3, own);
      check_cells(own, 100);
      barriers(20, 20, 2);
      std::exit(0);  // with its threads waiting
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child || status != 0) fail("the child failed");
    sums(10, 3, cells);
  }
  check_cells(cells, 60);
}

void names() {
  run(12, [](Member& m) {
    if (m.count != 12) fail("the system gave too few threads");
    if (m.index == 0) return;
    std::ifstream file("/proc/self/task/" + std::to_string(gettid()) + "/comm");
    std::string name;
    file >> name;
    if (name != (m.index < 10 ? "aserve-kernel-" : "aserve-kern-") + std::to_string(m.index)) fail(name.c_str());
  });
}

// Every part of every piece is done once, whoever is late, and each member's own come in their order.
void shares(int phases, int count) {
  std::vector<Taken> taken(static_cast<size_t>(kSharePhases * count));
  struct Phase {
    int64_t items, multiple, most, pieces;
  };
  constexpr Phase kinds[] = {{0, 1, 8, 1}, {1, 1, 8, 1}, {7, 2, 8, 3}, {97, 2, 8, 1}, {60, 1, 8, 2}, {33, 4, 3, 1}};
  std::vector<std::vector<std::atomic<int>>> done(static_cast<size_t>(phases));
  for (int phase = 0; phase < phases; phase++) {
    const Phase& k = kinds[phase % 6];
    done[static_cast<size_t>(phase)] = std::vector<std::atomic<int>>(static_cast<size_t>(k.items * k.pieces));
  }
  std::atomic<long> stolen{0};
  run(count, [&](Member& m) {
    Sharing sharing(taken.data(), m.index, m.count);
    for (int phase = 0; phase < phases; phase++) {
      const Phase& k = kinds[phase % 6];
      const Part own = part_of(k.items, k.multiple, m.index, m.count);
      int64_t expected = own.first, piece = 0;
      if ((phase + m.index) % 5 == 0) usleep(200);
      sharing.over(k.items, k.multiple, k.most, k.pieces, [&](const Share& s) {
        if (s.first % k.multiple != 0 || s.first >= s.last || s.end < s.last) fail("a part is not one");
        for (int64_t i = s.first; i < s.last; i++) done[static_cast<size_t>(phase)][static_cast<size_t>(s.piece * k.items + i)]++;
        if (s.first >= own.first && s.last <= own.last) {
          if (s.end != own.last) fail("a member's own stretch ends elsewhere");
          if (s.piece != piece) {
            piece = s.piece;
            expected = own.first;
          }
          if (s.first != expected) fail("a member's own parts are out of order");
          expected = s.last;
        } else {
          stolen++;
        }
      });
      sharing.end_phase();
      m.sync();
    }
  });
  for (const auto& phase : done)
    for (const auto& times : phase)
      if (times != 1) fail("a part was done too often or not at all");
  if (count > 1 && stolen == 0) fail("nobody took another's part");
}

double nanoseconds() {
  return static_cast<double>(std::chrono::steady_clock::now().time_since_epoch().count());
}

void times(int count) {
  double region = 1e18, barrier = 1e18, asleep = 1e18;
  for (int repeat = 0; repeat < 300; repeat++) {
    double start = nanoseconds();
    for (int i = 0; i < 100; i++) run(count, [](Member&) {});
    region = std::min(region, (nanoseconds() - start) / 100);
    run(count, [&](Member& m) {
      m.sync();
      const double begin = nanoseconds();
      for (int i = 0; i < 100; i++) m.sync();
      if (m.index == 0) barrier = std::min(barrier, (nanoseconds() - begin) / 100);
    });
  }
  double sum = 0;
  for (int repeat = 0; repeat < 200; repeat++) {
    usleep(3000);
    const double start = nanoseconds();
    run(count, [](Member&) {});
    const double took = nanoseconds() - start;
    asleep = std::min(asleep, took);
    sum += took;
  }
  std::printf("region %.0f ns, barrier %.0f ns, region of sleepers %.0f ns at best, %.0f on average\n", region, barrier,
              asleep, sum / 200);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string check = argc > 1 ? argv[1] : "";
  if (check == "sums") {
    for (int count = 1; count <= 4; count++) {
      std::vector<long> cells(29);
      sums(20000 / count, count, cells);
      check_cells(cells, 20000 / count);
    }
  } else if (check == "barriers") {
    for (int count = 1; count <= 4; count++) barriers(50, 100 / count, count);
  } else if (check == "callers") {
    callers();
  } else if (check == "nested") {
    nested();
  } else if (check == "fork") {
    forked();
  } else if (check == "names") {
    names();
  } else if (check == "shares") {
    for (int count = 1; count <= 4; count++) shares(600, count);
  } else if (check == "times" && argc > 2) {
    times(std::atoi(argv[2]));
  } else {
    return 2;
  }
  return 0;
}

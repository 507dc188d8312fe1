// The pool of threads: every index once, at any number of threads, in runs that follow at once or after a rest.
#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>

#include "check.h"
#include "pool.h"

using namespace owl2;
using namespace owl2::test;

namespace {

void every_index_once(int threads) {
  Pool pool(threads);
  for (int round = 0; round < 400; round++) {
    const int count = round % 37;
    std::vector<int> seen(count), by(count, -1);
    pool.run(count, [&](int index, int thread) {
      seen[index]++;
      by[index] = thread;
    });
    for (int i = 0; i < count; i++)
      check(seen[i] == 1 && by[i] >= 0 && by[i] < threads, "every index once", "pool", threads, count, i);
    if (round % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

// Results of one run are seen by the next, whoever wrote them.
void runs_follow_each_other(int threads) {
  Pool pool(threads);
  std::vector<long> values(64, 1);
  for (int round = 0; round < 200; round++) {
    std::vector<long> next(64);
    pool.run(64, [&](int i, int) { next[i] = (values[i] + values[(i + 1) % 64]) % 1000003; });
    values = next;
  }
  std::vector<long> expected(64, 1);
  for (int round = 0; round < 200; round++) {
    std::vector<long> next(64);
    for (int i = 0; i < 64; i++) next[i] = (expected[i] + expected[(i + 1) % 64]) % 1000003;
    expected = next;
  }
  check(values == expected, "runs follow each other", "pool", threads);
}

// A pool with nothing to do takes no time of a processor.
void it_sleeps() {
  Pool pool(4);
  std::atomic<int> done{0};
  pool.run(16, [&](int, int) { done++; });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const std::clock_t start = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  check(std::clock() - start < CLOCKS_PER_SEC / 20, "it sleeps", "pool");
}

}  // namespace

int main() {
  check(usable_processors() >= 1, "processors", "pool");
  for (const int threads : {1, 2, 3, 8}) {
    every_index_once(threads);
    runs_follow_each_other(threads);
  }
  it_sleeps();
  for (int i = 0; i < 50; i++) Pool(1 + i % 5);  // made and ended without a run
  return result("pool_test");
}

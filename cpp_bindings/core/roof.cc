#include "roof.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

namespace owl2 {
namespace {

constexpr size_t kBytes = size_t{512} << 20;  // more than caches hold
constexpr size_t kBlock = size_t{1} << 20;
constexpr int kRounds = 1 << 16;
// One stream of reads leaves bandwidth unused: the processor fetches ahead within a page, and waits at its end.
constexpr size_t kStreams = 8;
constexpr size_t kAhead = 64;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The highest rate of `work`, which returns what it did, until `seconds` have passed.
template <class Work>
double best_rate(double seconds, const Work& work) {
  const double end = now() + seconds;
  double best = 0;
  do {
    const double start = now(), done = work();
    best = std::max(best, done / (now() - start));
  } while (now() < end);
  return best;
}

double peak(Pool& pool, uint64_t (*loop)(int), double seconds) {
  std::vector<uint64_t> done(pool.threads());
  return best_rate(seconds, [&] {
    std::fill(done.begin(), done.end(), 0);
    pool.run(pool.threads(), [&](int, int thread) { done[thread] += loop(kRounds); });
    uint64_t all = 0;
    for (const uint64_t one : done) all += one;
    return static_cast<double>(all);
  });
}

// The sum of `count` words, read in kStreams streams at once.
uint64_t sum_of(const uint64_t* words, size_t count) {
  const size_t part = count / kStreams;
  uint64_t sums[8] = {};
  for (size_t i = 0; i < part; i += 8)
    for (size_t stream = 0; stream < kStreams; stream++) {
      const uint64_t* const line = words + stream * part + i;
      __builtin_prefetch(line + kAhead);
      for (size_t j = 0; j < 8; j++) sums[j] += line[j];
    }
  return std::accumulate(sums, sums + 8, uint64_t{0});
}

}  // namespace

double read_bandwidth(Pool& pool, double seconds) {
  // Of ones: pages that nothing was written to are one page of zeros.
  const std::vector<uint64_t> memory(kBytes / sizeof(uint64_t), 1);
  std::vector<uint64_t> sums(pool.threads());
  const int blocks = static_cast<int>(kBytes / kBlock);
  return best_rate(seconds, [&] {
    pool.run(blocks, [&](int block, int thread) {
      constexpr size_t kWords = kBlock / sizeof(uint64_t);
      sums[thread] += sum_of(memory.data() + block * kWords, kWords);
    });
    return static_cast<double>(kBytes);
  });
}

double int8_peak(Pool& pool, const Kernels& kernels, double seconds) {
  return peak(pool, kernels.int8_loop, seconds);
}

double fp32_peak(Pool& pool, const Kernels& kernels, double seconds) {
  return peak(pool, kernels.fp32_loop, seconds);
}

}  // namespace owl2

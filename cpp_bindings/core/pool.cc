#include "pool.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace owl2 {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kPatience{50};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits for a condition without sleeping; returns whether it came in time.
template <class Condition>
bool soon(const Condition& condition) {
  const auto until = Clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; i++) {
      if (condition()) return true;
      pause();
    }
  } while (Clock::now() < until);
  return false;
}

int this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<int>(getpid());
#else
  return 1;
#endif
}

// Processors that a control group's quota stands for; 0 where there is none.
int quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");  // version 2: "max 100000" or "150000 100000"
  std::string most;
  double period = 0;
  if (file >> most >> period && most != "max" && period > 0)
    return static_cast<int>(std::ceil(std::stod(most) / period));
  std::ifstream whole("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), part("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double used = -1;
  if (whole >> used && part >> period && used > 0 && period > 0) return static_cast<int>(std::ceil(used / period));
  return 0;
}

// Indices begin <= i < end that nobody has taken.
class alignas(64) Share {
 public:
  void set(uint32_t begin, uint32_t end) { range_ = static_cast<uint64_t>(begin) << 32 | end; }

  bool first(int* index) {
    return take([](uint32_t* begin, uint32_t*) { return (*begin)++; }, index);
  }
  bool last(int* index) {
    return take([](uint32_t*, uint32_t* end) { return --*end; }, index);
  }

 private:
  template <class Change>
  bool take(const Change& change, int* index) {
    uint64_t held = range_.load();
    for (;;) {
      uint32_t begin = static_cast<uint32_t>(held >> 32), end = static_cast<uint32_t>(held);
      if (begin >= end) return false;
      *index = static_cast<int>(change(&begin, &end));
      if (range_.compare_exchange_weak(held, static_cast<uint64_t>(begin) << 32 | end)) return true;
    }
  }

  std::atomic<uint64_t> range_{0};
};

}  // namespace

int usable_processors() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
  const int granted = quota();
  if (granted > 0 && granted < count) count = granted;
  return count > 0 ? count : 1;
}

struct Pool::State {
  std::mutex mutex;
  std::condition_variable work, done;
  std::atomic<uint64_t> epoch{0};    // number of runs
  std::atomic<int> busy{0};          // threads that have not finished this run
  std::atomic<int> asleep{0};        // threads that wait for `work`
  std::atomic<bool> waiting{false};  // the caller waits for `done`
  bool ending = false;
  Call call = nullptr;
  const void* task = nullptr;
  std::vector<Share> shares;  // of each thread
  std::vector<std::thread> threads;

  // A thread's own share from the front, so that it reads weights in the order of memory; then from the back of
  // others'.
  void take(int thread) {
    int index;
    while (shares[thread].first(&index)) call(task, index, thread);
    const int count = static_cast<int>(shares.size());
    for (int i = 1; i < count; i++)
      while (shares[(thread + i) % count].last(&index)) call(task, index, thread);
  }

  // Waits for a run after number `seen`; returns its number, or `seen` when the pool ends.
  uint64_t wait(uint64_t seen) {
    const auto changed = [&] { return epoch.load() != seen; };
    if (!soon(changed)) {
      std::unique_lock<std::mutex> lock(mutex);
      asleep++;
      work.wait(lock, [&] { return changed() || ending; });
      asleep--;
      if (ending) return seen;
    }
    return epoch.load();
  }

  void serve(int thread) {
    for (uint64_t seen = 0;;) {
      const uint64_t now = wait(seen);
      if (now == seen) return;
      seen = now;
      take(thread);
      if (busy.fetch_sub(1) == 1 && waiting.load()) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }
};

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {}

void Pool::start() {
  process_ = this_process();
  state_ = std::make_unique<State>();
  state_->shares = std::vector<Share>(threads_);
  for (int i = 1; i < threads_; i++) state_->threads.emplace_back(&State::serve, state_.get(), i);
}

Pool::~Pool() {
  if (state_ == nullptr) return;
  if (process_ != this_process()) {
    state_.release();  // the threads are those of the parent, and nothing here can be joined
    return;
  }
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->ending = true;
  }
  state_->work.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

void Pool::run_all(int count, Call call, const void* task) {
  if (state_ != nullptr && process_ != this_process()) state_.release();  // this process was forked
  if (state_ == nullptr) start();
  State& s = *state_;
  s.call = call;
  s.task = task;
  for (int i = 0; i < threads_; i++)
    s.shares[i].set(static_cast<uint32_t>(static_cast<int64_t>(count) * i / threads_),
                    static_cast<uint32_t>(static_cast<int64_t>(count) * (i + 1) / threads_));
  s.busy = threads_ - 1;
  s.epoch++;
  if (s.asleep.load() > 0) {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.work.notify_all();
  }
  s.take(0);
  const auto finished = [&] { return s.busy.load() == 0; };
  if (soon(finished)) return;
  std::unique_lock<std::mutex> lock(s.mutex);
  s.waiting = true;
  s.done.wait(lock, finished);
  s.waiting = false;
}

}  // namespace owl2

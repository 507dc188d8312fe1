// Threads that share the work of a step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace owl2 {

// Processors that this process may use: its affinity, and what its control group grants.
int usable_processors();

// A pool of threads, of which the caller of `run` is one.
//
// Between two runs that follow at once, threads wait in a loop for some microseconds; after that they sleep.
class Pool {
 public:
  // Throws std::system_error.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls task(index, thread) once for each index < count, and returns when all have returned. Tasks must not throw.
  // One run at a time.
  template <class Task>
  void run(int count, const Task& task) {
    if (count == 1 || threads_ == 1) {
      for (int index = 0; index < count; index++) task(index, 0);
      return;
    }
    run_all(count, [](const void* t, int index, int thread) { (*static_cast<const Task*>(t))(index, thread); }, &task);
  }

 private:
  using Call = void (*)(const void*, int, int);
  struct State;

  void run_all(int count, Call call, const void* task);
  void start();

  int threads_;
  int process_ = 0;
  std::unique_ptr<State> state_;
};

}  // namespace owl2

#include "mapped_file.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>

namespace owl2 {
namespace {

// What the handler reads: it may run at any moment, so there are no locks in it.
struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> damaged{false};
};
constexpr int kRanges = 256;  // mapped files of a process
Range ranges[kRanges];
std::mutex installing;
bool installed = false;
struct sigaction former;

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    if (address < range.begin.load() || address >= range.end.load()) continue;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    void* const start = reinterpret_cast<void*>(address / page * page);
    if (mmap(start, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) break;
    range.damaged = true;
    return;
  }
  if (former.sa_flags & SA_SIGINFO) {
    former.sa_sigaction(signal, info, context);
  } else if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) {
    former.sa_handler(signal);
  } else {
    ::signal(SIGBUS, SIG_DFL);  // the access is repeated, and ends the process as it would have
  }
}

void install() {
  std::lock_guard<std::mutex> lock(installing);
  if (installed) return;
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGBUS, &action, &former) != 0) throw std::system_error(errno, std::generic_category(), "sigaction");
  installed = true;
}

int claim(uintptr_t begin, uintptr_t end) {
  for (int slot = 0; slot < kRanges; slot++) {
    uintptr_t expected = 0;
    if (!ranges[slot].begin.compare_exchange_strong(expected, begin)) continue;
    ranges[slot].damaged = false;
    ranges[slot].end = end;
    return slot;
  }
  throw std::system_error(EMFILE, std::generic_category(), "too many mapped files");
}

}  // namespace

MappedFile::MappedFile(int descriptor, size_t size) : data_(nullptr), size_(size), slot_(-1) {
  install();
  void* const start = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
  if (start == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  data_ = static_cast<uint8_t*>(start);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(start);
  try {
    slot_ = claim(begin, begin + size);
  } catch (...) {
    munmap(start, size);
    throw;
  }
}

MappedFile::~MappedFile() {
  ranges[slot_].end = 0;
  ranges[slot_].begin = 0;
  munmap(data_, size_);
}

bool MappedFile::damaged() const {
  return ranges[slot_].damaged;
}

}  // namespace owl2

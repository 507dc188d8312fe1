#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace owl2 {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMapped = 1 << 16;  // from this size on, memory goes back to the system when it is freed

}  // namespace

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
#if defined(__unix__) || defined(__APPLE__)
  if (bytes >= kMapped) {
    start_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) throw std::bad_alloc();
    return;
  }
#endif
  const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  start_ = std::aligned_alloc(kAlignment, whole);
  if (start_ == nullptr) throw std::bad_alloc();
  std::memset(start_, 0, whole);
}

Memory::~Memory() {
  if (start_ == nullptr) return;
#if defined(__unix__) || defined(__APPLE__)
  if (bytes_ >= kMapped) {
    munmap(start_, bytes_);
    return;
  }
#endif
  std::free(start_);
}

Memory::Memory(Memory&& other) noexcept
    : start_(std::exchange(other.start_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(start_, other.start_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace owl2

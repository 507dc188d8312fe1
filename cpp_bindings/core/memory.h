// Memory for tensors: zeroed, aligned to 64 bytes, and given to the process page by page as it is touched.
#pragma once

#include <cstddef>

namespace owl2 {

class Memory {
 public:
  Memory() = default;
  // Throws std::bad_alloc.
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(start_);
  }

 private:
  void* start_ = nullptr;
  size_t bytes_ = 0;
};

// An array that grows and does not keep its content.
template <class T>
class Scratch {
 public:
  T* of(size_t count) {
    if (count * sizeof(T) > memory_.bytes()) memory_ = Memory(count * sizeof(T));
    return memory_.as<T>();
  }
  T* get() const { return memory_.as<T>(); }

 private:
  Memory memory_;
};

}  // namespace owl2

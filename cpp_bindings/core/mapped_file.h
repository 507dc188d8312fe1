// A file in memory, read only, shared with the system's cache and with other processes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace owl2 {

// Where another program truncates the file, reads give zeros instead of a bus error that would kill the process, and
// `damaged` says so from then on. For that, the first mapping of a process puts a handler for SIGBUS in front of the
// one that is there, which is called for every other address.
class MappedFile {
 public:
  // Maps `size` bytes of an open file, which may be closed then. Throws std::system_error.
  MappedFile(int descriptor, size_t size);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool damaged() const;

 private:
  uint8_t* data_;
  size_t size_;
  int slot_;
};

}  // namespace owl2

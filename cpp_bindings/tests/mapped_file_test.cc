// A mapped file that is truncated while it is read: the reader goes on with zeros, and the file says that it is
// damaged.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "check.h"
#include "mapped_file.h"

using namespace owl2;
using namespace owl2::test;

namespace {

struct Scratch {
  Scratch() : path("/tmp/owl2-mapped-XXXXXX"), descriptor(mkstemp(path.data())) {
    std::vector<char> content(1 << 20, 7);
    check(write(descriptor, content.data(), content.size()) == static_cast<ssize_t>(content.size()), "written", "file");
  }
  ~Scratch() {
    close(descriptor);
    unlink(path.c_str());
  }
  std::string path;
  int descriptor;
};

long sum(const MappedFile& file) {
  long total = 0;
  for (size_t i = 0; i < file.size(); i += 512) total += *(static_cast<const volatile uint8_t*>(file.data()) + i);
  return total;
}

}  // namespace

int main() {
  const long whole = 7L * ((1 << 20) / 512);
  Scratch first, second;
  MappedFile one(first.descriptor, 1 << 20), other(second.descriptor, 1 << 20);
  check(sum(one) == whole && sum(other) == whole, "content", "file");
  check(!one.damaged() && !other.damaged(), "whole", "file");
  check(ftruncate(first.descriptor, 8192) == 0, "truncated", "file");
  check(sum(one) == 7L * (8192 / 512), "zeros in the hole", "file");
  check(one.damaged() && !other.damaged(), "damaged", "file");
  check(sum(other) == whole, "the other file", "file");
  for (int i = 0; i < 100; i++) {
    Scratch scratch;
    MappedFile file(scratch.descriptor, 1 << 20);
    if (i % 2 == 0 && ftruncate(scratch.descriptor, 0) == 0)
      check(sum(file) == 0 && file.damaged(), "again", "file", i);
  }
  return result("mapped_file_test");
}

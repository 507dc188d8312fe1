// What the files of the module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "decoder.h"
#include "mapped_file.h"

namespace nb = nanobind;

namespace owl2 {

// Bytes of a mapped file, or of a bytes object, which stays as long as they are in use.
struct View {
  nb::object owner;
  const uint8_t* data;
  size_t bytes;

  template <class T>
  const T* as(size_t count, const char* what) const {
    if (bytes != count * sizeof(T) || reinterpret_cast<uintptr_t>(data) % alignof(T) != 0)
      throw std::invalid_argument(std::string(what) + " has " + std::to_string(bytes) + " bytes instead of " +
                                  std::to_string(count * sizeof(T)) + ", or they are not aligned");
    return reinterpret_cast<const T*>(data);
  }
};

void bind_weights(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_machine(nb::module_& m);

}  // namespace owl2

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "binding.h"
#include "cpu.h"
#include "pool.h"

namespace owl2 {

void bind_machine(nb::module_& m) {
  m.def(
      "kernels", [] { return std::string(choose_kernels().name); },
      "Instruction set whose kernels are in use: the best of the processor's, or what OWL2_CPU says.");
  m.def(
      "available_kernels",
      [] {
        std::vector<std::string> names;
        for (const Kernels* one : available_kernels()) names.emplace_back(one->name);
        return names;
      },
      "Instruction sets that this processor has kernels for, the best first.");
  m.def("usable_processors", &usable_processors, "Processors that this process may use.");
}

}  // namespace owl2

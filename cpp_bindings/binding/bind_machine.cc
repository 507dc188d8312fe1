#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "binding.h"
#include "cpu.h"
#include "pool.h"
#include "roof.h"

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
  m.def(
      "roof",
      [](int threads, double seconds) {
        const Kernels& kernels = choose_kernels();
        double bandwidth, int8, fp32;
        {
          const nb::gil_scoped_release released;
          Pool pool(threads);
          bandwidth = read_bandwidth(pool, seconds);
          int8 = int8_peak(pool, kernels, seconds);
          fp32 = fp32_peak(pool, kernels, seconds);
        }
        return nb::make_tuple(bandwidth, int8, fp32);
      },
      nb::arg("threads"), nb::arg("seconds"),
      nb::sig("def roof(threads: int, seconds: float) -> tuple[float, float, float]"),
      "What the machine can do at most, each measured for about `seconds`.\n\n"
      "Bytes read per second, and multiply-adds of int8 and of float32 per second.");
  m.def("usable_processors", &usable_processors, "Processors that this process may use.");
}

}  // namespace owl2

// Which kernels this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace owl2 {

// Instruction sets that this processor and system have and this library has kernels for, the best first.
std::vector<const Kernels*> available_kernels();

// The best of them, or the one that the environment variable OWL2_CPU names.
// Throws std::invalid_argument where OWL2_CPU names another.
const Kernels& choose_kernels();

}  // namespace owl2

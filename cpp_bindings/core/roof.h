// What this machine can do at most: the roof that speed is measured against.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "pool.h"

namespace owl2 {

// Bytes per second that the pool's threads read of memory together, the best of about `seconds`.
// Throws std::bad_alloc.
double read_bandwidth(Pool& pool, double seconds);

// Multiply-adds per second of the pool's threads on registers alone, the best of about `seconds`.
double int8_peak(Pool& pool, const Kernels& kernels, double seconds);
double fp32_peak(Pool& pool, const Kernels& kernels, double seconds);

}  // namespace owl2

// Lanes as an array: the twin that the vector kernels are compared with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"

namespace owl2 {
namespace {

struct Lanes {
  float v[16];
};

// Independent sums that keep the arithmetic busy and fit the registers.
constexpr int kRoofSums = 2;

template <class F>
inline Lanes each(F f) {
  Lanes y;
  for (int i = 0; i < 16; i++) y.v[i] = f(i);
  return y;
}

inline Lanes broadcast(float x) {
  return each([=](int) { return x; });
}
inline Lanes load(const float* x) {
  return each([=](int i) { return x[i]; });
}
inline Lanes load(const uint16_t* x) {
  return each([=](int i) { return float_of_half(x[i]); });
}
inline Lanes load(const int8_t* x) {
  return each([=](int i) { return static_cast<float>(x[i]); });
}
inline void store(float* y, Lanes x) {
  std::memcpy(y, x.v, sizeof x.v);
}
inline void store(uint16_t* y, Lanes x) {
  for (int i = 0; i < 16; i++) y[i] = half_of_float(x.v[i]);
}
inline Lanes add(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes subtract(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes multiply(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes divide(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes maximum(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes minimum(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Absolute values as the integers of their bits: NaN is larger than everything else.
inline Lanes largest_magnitude(Lanes a, Lanes b) {
  return each([&](int i) {
    uint32_t x, y;
    std::memcpy(&x, &a.v[i], 4);
    std::memcpy(&y, &b.v[i], 4);
    x &= 0x7fffffff;
    y &= 0x7fffffff;
    const uint32_t larger = x > y ? x : y;
    float result;
    std::memcpy(&result, &larger, 4);
    return result;
  });
}
// Lanes from `count` on become `value`.
inline Lanes filled_from(Lanes x, int count, float value) {
  return each([&](int i) { return i < count ? x.v[i] : value; });
}
// x * 2^n, where `shifted` is n + 1.5 * 2^23.
inline Lanes times_power_of_two(Lanes x, Lanes shifted) {
  return each([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &shifted.v[i], 4);
    bits = (bits - 0x4b400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x.v[i] * power;
  });
}
template <class F>
inline float reduced(Lanes x, F f) {
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; i++) x.v[i] = f(x.v[i], x.v[i + step]);
  return x.v[0];
}
inline float sum(Lanes x) {
  return reduced(x, [](float a, float b) { return a + b; });
}
inline float largest(Lanes x) {
  return reduced(x, [](float a, float b) { return a > b ? a : b; });
}
inline float largest_bits(Lanes x) {
  return reduced(x, [](float a, float b) { return largest_magnitude(broadcast(a), broadcast(b)).v[0]; });
}
// Nearest integers, ties to even; returns their sum.
inline int32_t store_rounded(int8_t* y, Lanes x) {
  int32_t total = 0;
  for (int i = 0; i < 16; i++) {
    const float rounded = std::nearbyint(x.v[i]);
    y[i] = static_cast<int8_t>(rounded >= -127.0f && rounded <= 127.0f ? rounded : 0.0f);
    total += y[i];
  }
  return total;
}

#include "lanes.h"

}  // namespace
}  // namespace owl2

// What the tests share: a failure is told, and the program goes on to the next check.
#pragma once

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu.h"

namespace owl2::test {

inline int failures = 0;

inline void check(bool holds, const char* what, const char* name, int a = 0, int b = 0, int c = 0) {
  if (holds) return;
  if (failures++ < 20) std::printf("FAILED: %s (%s, %d, %d, %d)\n", what, name, a, b, c);
}

inline int result(const char* name) {
  std::printf("%s: %d failures, %zu instruction sets\n", name, failures, available_kernels().size());
  return failures == 0 ? 0 : 1;
}

inline std::vector<float> numbers(size_t count, std::mt19937* random, float scale = 1.0f) {
  std::vector<float> values(count);
  for (float& value : values) value = scale * (static_cast<float>((*random)() % 20001) - 10000.0f) / 10000.0f;
  return values;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace owl2::test

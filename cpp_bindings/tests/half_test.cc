// Conversions of float16 by every instruction set against those in plain C++, through the K/V cache's kernel: all
// 65,536 halves, and floats between and around them.
#include "../core/half.h"
#include "check.h"

using namespace owl2;
using namespace owl2::test;

namespace {

// What a kernel stores of these floats as a value.
std::vector<uint16_t> converted(const Kernels& kernels, const std::vector<float>& x) {
  std::vector<uint16_t> keys(kBlockPositions * 16), values(kBlockPositions * 16), made;
  const HeadBlock block{KvType::f16, 16, keys.data(), values.data(), nullptr, nullptr};
  for (size_t i = 0; i + 16 <= x.size(); i += 16) {
    kernels.store_key_value(block, 0, x.data() + i, x.data() + i);
    made.insert(made.end(), values.begin(), values.begin() + 16);
  }
  return made;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool is_nan(uint16_t half) {
  return (half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0;
}

}  // namespace

int main() {
  std::vector<float> x;
  for (uint32_t half = 0; half < 65536; half++) x.push_back(float_of_half(static_cast<uint16_t>(half)));
  std::mt19937 random(4);
  for (int i = 0; i < 400000; i++) x.push_back(from_bits(static_cast<uint32_t>(random())));
  for (uint32_t half = 0; half < 31744; half++) {  // exactly between two neighbours, and a little to either side
    const uint32_t low = [&] {
      uint32_t b;
      const float f = float_of_half(static_cast<uint16_t>(half));
      std::memcpy(&b, &f, 4);
      return b;
    }();
    for (const uint32_t offset : {0xfffu, 0x1000u, 0x1001u}) x.push_back(from_bits(low + offset));
  }
  x.resize(x.size() / 16 * 16);
  for (uint32_t half = 0; half < 65536; half++) {
    const uint16_t again = half_of_float(float_of_half(static_cast<uint16_t>(half)));
    check(again == half || is_nan(static_cast<uint16_t>(half)), "a half there and back", "plain",
          static_cast<int>(half));
  }
  const std::vector<const Kernels*> all = available_kernels();
  const std::vector<uint16_t> expected = converted(*all.back(), x);
  for (const Kernels* one : all) {
    const std::vector<uint16_t> made = converted(*one, x);
    for (size_t i = 0; i < made.size(); i++)
      check(made[i] == expected[i] || (is_nan(made[i]) && is_nan(expected[i])), "float to half", one->name,
            static_cast<int>(i));
  }
  return result("half_test");
}

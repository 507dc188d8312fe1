// Kernels on single rows, and dense products, against the scalar ones: bit for bit.
#include <cmath>

#include "check.h"

using namespace owl2;
using namespace owl2::test;

namespace {

struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

Quantized quantized(const Kernels& kernels, const std::vector<float>& x, int group, int bits, bool panels) {
  const size_t groups = (x.size() + group - 1) / group, lanes = panels ? 16 : 1;
  Quantized made{std::vector<int8_t>(groups * group * lanes), std::vector<float>(groups * lanes),
                 std::vector<int32_t>(groups * lanes)};
  kernels.quantize(x.data(), static_cast<int>(x.size()), group, bits, made.codes.data(), panels ? 64 : 4,
                   made.scales.data(), made.sums.data(), lanes);
  return made;
}

void compare_rows(const Kernels& one, const Kernels& scalar, std::mt19937* random) {
  for (const int width : {1, 5, 16, 31, 64, 100, 4096}) {
    const std::vector<float> x = numbers(width, random, 3.0f), other = numbers(width, random);
    std::vector<float> y(width), expected(width);
    one.rms_norm(x.data(), other.data(), 1e-6f, width, y.data());
    scalar.rms_norm(x.data(), other.data(), 1e-6f, width, expected.data());
    check(same(y, expected), "rms_norm", one.name, width);

    y = numbers(width, random, 100.0f);
    expected = y;
    one.silu_gate(y.data(), other.data(), width);
    scalar.silu_gate(expected.data(), other.data(), width);
    check(same(y, expected), "silu_gate", one.name, width);

    y = numbers(2 * width, random);
    expected = y;
    one.rotate(y.data(), x.data(), other.data(), width, 0.125f);
    scalar.rotate(expected.data(), x.data(), other.data(), width, 0.125f);
    check(same(y, expected), "rotate", one.name, width);
  }
}

void compare_quantized(const Kernels& one, const Kernels& scalar, std::mt19937* random) {
  for (const int bits : {4, 8})
    for (const int group : {32, 64, 128})
      for (const int width : {1, 31, group, group + 1, 5 * group - 3})
        for (const bool panels : {false, true}) {
          std::vector<float> x = numbers(width, random);
          if (width == group) x.assign(width, 0.0f);
          if (width == 31) x[3] = 1e30f;
          const Quantized made = quantized(one, x, group, bits, panels),
                          expected = quantized(scalar, x, group, bits, panels);
          const bool equal =
              same(made.codes, expected.codes) && same(made.scales, expected.scales) && same(made.sums, expected.sums);
          check(equal, "quantize", one.name, bits, group, width);
        }
}

void compare_dense(const Kernels& one, const Kernels& scalar, std::mt19937* random) {
  for (const int outputs : {1, 16, 33, 100})
    for (const int inputs : {1, 7, 64})
      for (const int rows : {1, 3, 9}) {
        const std::vector<float> values = numbers(static_cast<size_t>(inputs) * outputs, random);
        const std::vector<float> x = numbers(static_cast<size_t>(rows) * inputs, random),
                                 bias = numbers(outputs, random);
        const DenseMatrix weight{outputs, inputs, FloatType::f32, values.data()};
        const auto product = [&](const Kernels& kernels) {
          std::vector<float> y(static_cast<size_t>(rows) * outputs, 0.25f);
          Output out;
          out.y = y.data();
          out.stride = static_cast<size_t>(outputs);
          out.first = rows > 3 ? 1 : 0;
          out.last = rows;
          out.add = rows == 3;
          out.bias = inputs == 7 ? bias.data() : nullptr;
          kernels.dense_product(weight, x.data(), static_cast<size_t>(inputs), 0, outputs, out);
          return y;
        };
        check(same(product(one), product(scalar)), "dense_product", one.name, outputs, inputs, rows);
      }
}

// Not against a twin: against the library's functions.
void compare_with_the_library(const Kernels& one, std::mt19937* random) {
  const std::vector<float> x = numbers(1000, random, 20.0f), ones(1000, 1.0f);
  std::vector<float> y = x;
  one.silu_gate(y.data(), ones.data(), y.size());
  for (size_t i = 0; i < y.size(); i++) {
    const double expected = x[i] / (1.0 + std::exp(-static_cast<double>(x[i])));
    check(std::fabs(y[i] - expected) <= 1e-6 * std::fabs(expected) + 1e-12, "silu", one.name, static_cast<int>(i));
  }
  std::vector<float> normed(1000);
  one.rms_norm(x.data(), ones.data(), 0.0f, 1000, normed.data());
  double squares = 0;
  for (const float value : normed) squares += static_cast<double>(value) * value;
  check(std::fabs(squares / 1000 - 1) < 1e-5, "rms", one.name);
}

}  // namespace

int main() {
  std::mt19937 random(2);
  const std::vector<const Kernels*> all = available_kernels();
  for (const Kernels* one : all) {
    compare_rows(*one, *all.back(), &random);
    compare_quantized(*one, *all.back(), &random);
    compare_dense(*one, *all.back(), &random);
    compare_with_the_library(*one, &random);
  }
  return result("rows_test");
}

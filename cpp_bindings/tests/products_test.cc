// Products of every instruction set that this processor has against the scalar ones, bit for bit.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu.h"
#include "kernels.h"

namespace {

using owl2::Activations;
using owl2::IntegerMatrix;
using owl2::Kernels;
using owl2::Output;

struct Case {
  int bits, group, inputs, outputs, rows;
  bool zero_points;
};

struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  Activations view;
};

void quantize(const Kernels& kernels, const Case& c, const std::vector<float>& x, bool panels, Quantized* out) {
  const size_t groups = (c.inputs + c.group - 1) / c.group, stored = (c.rows + 15) / 16 * 16;
  out->codes.assign(stored * groups * c.group, 0);
  out->scales.assign(stored * groups, 0.0f);
  out->sums.assign(stored * groups, 0);
  for (int row = 0; row < c.rows; row++) {
    const size_t first = static_cast<size_t>(panels ? row / 16 * 16 : row) * groups, lane = panels ? row % 16 : 0;
    kernels.quantize(x.data() + static_cast<size_t>(row) * c.inputs, c.inputs, c.group, c.bits,
                     out->codes.data() + first * c.group + 4 * lane, panels ? 64 : 4, out->scales.data() + first + lane,
                     out->sums.data() + first + lane, panels ? 16 : 1);
  }
  out->view = {c.rows,          static_cast<int>(groups), c.group, panels, out->codes.data(), out->scales.data(),
               out->sums.data()};
}

// Number of kernel tables that differ from the scalar one.
int differences(const Case& c, const std::vector<const Kernels*>& all, std::mt19937* random) {
  const size_t groups = (c.inputs + c.group - 1) / c.group;
  std::vector<uint8_t> codes(c.outputs * groups * c.group * c.bits / 8), zeros(c.outputs * ((groups * c.bits + 7) / 8));
  std::vector<float> scales(c.outputs * groups), x(static_cast<size_t>(c.rows) * c.inputs), bias(c.outputs);
  const auto number = [&] { return (static_cast<int>((*random)() % 2001) - 1000) / 1000.0f; };
  for (uint8_t& code : codes) code = static_cast<uint8_t>((*random)());
  for (uint8_t& zero : zeros) zero = static_cast<uint8_t>((*random)());
  for (float& scale : scales) scale = number() / 10;
  for (float& value : x) value = number();
  for (float& value : bias) value = number();
  const IntegerMatrix w{
      c.outputs, c.inputs, c.bits, c.group, codes.data(), scales.data(), c.zero_points ? zeros.data() : nullptr};
  const auto product = [&](const Kernels& kernels, bool panels) {
    Quantized q;
    quantize(kernels, c, x, panels, &q);
    std::vector<float> y(static_cast<size_t>(c.rows) * c.outputs, 0.5f);
    Output out;
    out.y = y.data();
    out.stride = static_cast<size_t>(c.outputs);
    out.first = c.rows > 3 ? 2 : 0;
    out.last = c.rows;
    out.add = c.rows % 2 == 0;
    out.bias = c.rows % 3 == 0 ? nullptr : bias.data();
    kernels.integer_product(w, q.view, 0, c.outputs, out);
    return y;
  };
  const std::vector<float> expected = product(*all.back(), false);
  int found = 0;
  for (const Kernels* kernels : all) {
    for (const bool panels : {false, true}) {
      const std::vector<float> y = product(*kernels, panels);
      if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0) continue;
      found++;
      std::printf("%s, %s: %d bits, groups of %d, %d x %d, %d rows, zero points %d\n", kernels->name,
                  panels ? "panels" : "rows", c.bits, c.group, c.outputs, c.inputs, c.rows, c.zero_points);
    }
  }
  return found;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const std::vector<const Kernels*> all = owl2::available_kernels();
  int cases = 0, found = 0;
  for (const int bits : {4, 8})
    for (const int group : {32, 64, 128})
      for (const bool zero_points : {false, true})
        for (const int inputs : {group, group * 3 - 5, group * 9})
          for (const int outputs : {1, 7, 33, 70})
            for (const int rows : {1, 2, 3, 5, 17, 40}) {
              found += differences({bits, group, inputs, outputs, rows, zero_points}, all, &random);
              cases++;
            }
  std::printf("%d cases, %zu instruction sets, %d differ\n", cases, all.size(), found);
  return found == 0 ? 0 : 1;
}

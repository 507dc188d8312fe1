// Weights as a bundle stores them: views into its mapped file, which nothing here copies.
//
// N outputs, K inputs; a weight multiplies rows of activations [M, K] to rows [M, N].
#pragma once

#include <cstddef>
#include <cstdint>

namespace owl2 {

// Integers with a scale for every row and group of columns, in the layout of ONNX Runtime's MatMulNBits.
struct IntegerMatrix {
  int outputs = 0;                       // N
  int inputs = 0;                        // K
  int bits = 4;                          // 4 or 8
  int group = 128;                       // 32, 64 or 128 columns
  const uint8_t* codes = nullptr;        // [N, G, group * bits / 8]; of two 4-bit neighbours the first is the low half
  const float* scales = nullptr;         // [N, G], of either sign
  const uint8_t* zero_points = nullptr;  // [N, ceil(G * bits / 8)]; null: 2^(bits-1)

  int groups() const { return (inputs + group - 1) / group; }
  size_t group_bytes() const { return static_cast<size_t>(group) * bits / 8; }
  size_t row_bytes() const { return groups() * group_bytes(); }
  int zero_point(int output, int index) const {
    if (zero_points == nullptr) return 1 << (bits - 1);
    const size_t row_width = (static_cast<size_t>(groups()) * bits + 7) / 8;
    const uint8_t* row = zero_points + output * row_width;
    return bits == 8 ? row[index] : row[index / 2] >> (index % 2 * 4) & 15;
  }
};

enum class FloatType { f32, f16 };

// Floats, inputs by outputs: [K, N].
struct DenseMatrix {
  int outputs = 0;
  int inputs = 0;
  FloatType type = FloatType::f32;
  const void* values = nullptr;
};

// Rows of activations as int8, with a scale for every row and group.
//
// Within a group of a 4-bit product, elements with even index come first, then the odd ones: so they meet the low and
// the high halves of the weights' bytes. The last group is filled with zeros.
//
// Few rows lie one after the other. Many lie in panels of 16, of which each vector register takes four columns.
struct Activations {
  static constexpr int kPanel = 16;

  int rows = 0;    // M
  int groups = 0;  // G
  int group = 0;
  bool panels = false;
  const int8_t* codes = nullptr;  // rows: [M, G, group]; panels: [ceil(M / 16), G, group / 4, 16, 4]
  const float* scales = nullptr;  // rows: [M, G];        panels: [ceil(M / 16), G, 16]
  const int32_t* sums = nullptr;  // of the codes of a group, in the order of `scales`
};

// Where a product writes: y[m * stride + n - origin] for rows first <= m < last.
struct Output {
  float* y = nullptr;
  size_t stride = 0;
  int origin = 0;
  int first = 0;
  int last = 0;
  bool add = false;             // to what is there
  const float* bias = nullptr;  // [N]
};

}  // namespace owl2

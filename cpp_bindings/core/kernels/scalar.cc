// Plain C++: runs everywhere, and says what every other instruction set has to compute.
#include "../kernels.h"
#include "lanes_scalar.h"

namespace owl2 {
namespace {

#include "output.inl"
#include "rows.inl"
#include "attention.inl"
#include "dense.inl"
#include "roof.inl"

// The codes of a row and group in the order in which they are laid out, less the zero point.
void unpack(const IntegerMatrix& w, int n, int g, int* codes) {
  const uint8_t* bytes = w.codes + n * w.row_bytes() + g * w.group_bytes();
  const int half = w.group / 2, zero = w.zero_point(n, g);
  for (int i = 0; i < w.group; i++) {
    const int code = w.bits == 8 ? bytes[i] : i < half ? bytes[i] & 15 : bytes[i - half] >> 4;
    codes[i] = code - zero;
  }
}

int8_t code(const Activations& x, int row, int g, int i) {
  if (!x.panels) return x.codes[(static_cast<size_t>(row) * x.groups + g) * x.group + i];
  const size_t panel = (static_cast<size_t>(row / 16) * x.groups + g) * x.group / 4 + i / 4;
  return x.codes[(panel * 16 + row % 16) * 4 + i % 4];
}

float scale(const Activations& x, int row, int g) {
  if (!x.panels) return x.scales[static_cast<size_t>(row) * x.groups + g];
  return x.scales[(static_cast<size_t>(row / 16) * x.groups + g) * 16 + row % 16];
}

void integer_product(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  int codes[128];
  for (int n = begin; n < end; n++) {
    for (int row = out.first; row < out.last; row++) {
      float y = 0.0f;
      for (int g = 0; g < w.groups(); g++) {
        unpack(w, n, g, codes);
        int32_t dot = 0;
        for (int i = 0; i < w.group; i++) dot += codes[i] * code(x, row, g, i);
        const float both = w.scales[static_cast<size_t>(n) * w.groups() + g] * scale(x, row, g);
        y = std::fma(static_cast<float>(dot), both, y);
      }
      write_one(out, row, n, y);
    }
  }
}

// Sixteen sums of products of four codes.
uint64_t int8_loop(int rounds) {
  int32_t sums[16] = {};
  int8_t codes[64];
  for (int i = 0; i < 64; i++) codes[i] = static_cast<int8_t>(rounds + i);
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < 64; i++) sums[i / 4] += codes[i] * static_cast<int8_t>(round + i);
  int32_t all = 0;
  for (const int32_t sum : sums) all ^= sum;
  return static_cast<uint64_t>(rounds) * 64 + (all == 0x5eed);
}

}  // namespace

extern const Kernels kScalar;
const Kernels kScalar = {"scalar",  16,     rms_norm,        quantize, integer_product, dense_product,
                         silu_gate, rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

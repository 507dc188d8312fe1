// Plain C++: runs everywhere, and says what every other instruction set has to compute.
#include "../kernels.h"
#include "lanes_scalar.h"

namespace owl2 {
namespace {

#include "output.inl"
#include "rows.inl"
#include "attention.inl"
#include "dense.inl"

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

}  // namespace

extern const Kernels kScalar;
const Kernels kScalar = {"scalar",      16,        rms_norm, quantize,        integer_product,
                         dense_product, silu_gate, rotate,   store_key_value, attend};

}  // namespace owl2

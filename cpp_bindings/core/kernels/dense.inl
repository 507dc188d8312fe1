// Products with float weights [K, N], for any Lanes: each output is one chain of fused multiply-adds over k.

constexpr int kDenseLanes = 4;
constexpr int kDenseRows = 6;

template <class Value, int R>
void dense_tile(const Value* w, size_t w_stride, int inputs, const float* x, size_t x_stride, int width,
                const Output& out, int row, int n) {
  Lanes sums[R][kDenseLanes];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < kDenseLanes; i++) sums[r][i] = broadcast(0.0f);
  const bool whole = width >= 16 * kDenseLanes;
  for (int k = 0; k < inputs; k++, w += w_stride) {
    Lanes part[kDenseLanes];
    if (whole) {
      for (int i = 0; i < kDenseLanes; i++) part[i] = load(w + 16 * i);
    } else {
      Value padded[16 * kDenseLanes] = {};
      for (int i = 0; i < width; i++) padded[i] = w[i];
      for (int i = 0; i < kDenseLanes; i++) part[i] = load(padded + 16 * i);
    }
    for (int r = 0; r < R; r++) {
      const Lanes value = broadcast(x[r * x_stride + k]);
      for (int i = 0; i < kDenseLanes; i++) sums[r][i] = fused(value, part[i], sums[r][i]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int i = 0; i < kDenseLanes && width > 16 * i; i++)
      write_lanes(out, row + r, n + 16 * i, width - 16 * i, sums[r][i]);
  }
}

template <class Value>
void dense_values(const Value* values, const DenseMatrix& weight, const float* x, size_t x_stride, int begin, int end,
                  const Output& out) {
  const size_t stride = static_cast<size_t>(weight.outputs);
  for (int n = begin; n < end; n += 16 * kDenseLanes) {
    const int width = end - n < 16 * kDenseLanes ? end - n : 16 * kDenseLanes;
    int row = out.first;
    for (; row + kDenseRows <= out.last; row += kDenseRows)
      dense_tile<Value, kDenseRows>(values + n, stride, weight.inputs, x + row * x_stride, x_stride, width, out, row,
                                    n);
    for (; row < out.last; row++)
      dense_tile<Value, 1>(values + n, stride, weight.inputs, x + row * x_stride, x_stride, width, out, row, n);
  }
}

void dense_product(const DenseMatrix& weight, const float* x, size_t x_stride, int begin, int end, const Output& out) {
  if (weight.type == FloatType::f32)
    dense_values(static_cast<const float*>(weight.values), weight, x, x_stride, begin, end, out);
  else
    dense_values(static_cast<const uint16_t*>(weight.values), weight, x, x_stride, begin, end, out);
}

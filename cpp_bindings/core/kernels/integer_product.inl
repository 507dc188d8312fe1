// Integer products for instruction sets with short registers. Each one brings:
//
//   Bytes, kBytes                         a register of codes and its size
//   unpack<Bits, Group>(bytes, Bytes*)    a group's codes in the order of the activations, Group / kBytes registers
//   Sums dot<Bits, Group>(Bytes*, x)      their products with one row's group, added in some lanes
//   whole_sums(Sums[4], int32_t[4])       the lanes of each added
//   dot_panel<Bits, Group>(codes, x, dots)
//                                         four outputs [4][Group] by a panel [Group / 4][16][4] -> [4][16]
//   kZero<Bits>                           what it takes off eight-bit codes (they may be wanted signed)

constexpr int kAhead = 12;       // outputs whose weights are fetched ahead
constexpr int kRowsPiece = 16;   // outputs that all rows see before the next are read
constexpr int kPanelRows = 256;  // rows whose sums stay in the cache
constexpr int kPanelOutputs = 32;

template <int Bits, int Group, int R>
void add_row_groups(const IntegerMatrix& w, const Activations& x, const int* outputs, int row, float y[][4]) {
  const int groups = w.groups();
  for (int g = 0; g < groups; g++) {
    Sums parts[R][4];
    float scales[4];
    int32_t zeros[4];
    for (int i = 0; i < 4; i++) {
      const uint8_t* const bytes = w.codes + outputs[i] * w.row_bytes() + g * w.group_bytes();
      __builtin_prefetch(bytes + kAhead * w.row_bytes());
      Bytes codes[Group / kBytes];
      unpack<Bits, Group>(bytes, codes);
      for (int r = 0; r < R; r++)
        parts[r][i] = dot<Bits, Group>(codes, x.codes + (static_cast<size_t>(row + r) * groups + g) * Group);
      scales[i] = w.scales[static_cast<size_t>(outputs[i]) * groups + g];
      zeros[i] = w.zero_point(outputs[i], g) - kZero<Bits>;
    }
    for (int r = 0; r < R; r++) {
      const size_t place = static_cast<size_t>(row + r) * groups + g;
      int32_t dots[4];
      whole_sums(parts[r], dots);
      for (int i = 0; i < 4; i++)
        y[r][i] = __builtin_fmaf(static_cast<float>(dots[i] - zeros[i] * x.sums[place]), scales[i] * x.scales[place],
                                 y[r][i]);
    }
  }
}

template <int Bits, int Group, int R>
void few_rows_of(const IntegerMatrix& w, const Activations& x, int begin, int end, int row, const Output& out) {
  for (int n = begin; n < end; n += 4) {
    int outputs[4];
    for (int i = 0; i < 4; i++) outputs[i] = n + i < end ? n + i : end - 1;
    float y[R][4] = {};
    add_row_groups<Bits, Group, R>(w, x, outputs, row, y);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 4 && n + i < end; i++) write_one(out, row + r, n + i, y[r][i]);
  }
}

template <int Bits, int Group>
void few_rows(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  for (int n = begin; n < end; n += kRowsPiece) {
    const int last = n + kRowsPiece < end ? n + kRowsPiece : end;
    int row = out.first;
    for (; row + 4 <= out.last; row += 4) few_rows_of<Bits, Group, 4>(w, x, n, last, row, out);
    for (; row < out.last; row++) few_rows_of<Bits, Group, 1>(w, x, n, last, row, out);
  }
}

// Adds the products of 32 outputs and panels first <= p < last to sums [32][kPanelRows].
template <int Bits, int Group>
void add_panels(const IntegerMatrix& w, const Activations& x, int n, int width, int first, int last, float* sums) {
  alignas(64) uint8_t codes[kPanelOutputs * Group];
  const int groups = w.groups();
  for (int g = 0; g < groups; g++) {
    for (int i = 0; i < kPanelOutputs; i++) {
      const size_t output = static_cast<size_t>(n + (i < width ? i : 0));
      const uint8_t* const bytes = w.codes + output * w.row_bytes() + g * w.group_bytes();
      __builtin_prefetch(bytes + kPanelOutputs * w.row_bytes());
      Bytes unpacked[Group / kBytes];
      unpack<Bits, Group>(bytes, unpacked);
      __builtin_memcpy(codes + i * Group, unpacked, Group);
    }
    for (int p = first; p < last; p++) {
      const size_t place = static_cast<size_t>(p) * groups + g;
      const Lanes row_scales = load(x.scales + place * 16);
      const int32_t* const row_sums = x.sums + place * 16;
      for (int i = 0; i < kPanelOutputs; i += 4) {
        alignas(64) int32_t dots[4][16];
        dot_panel<Bits, Group>(codes + i * Group, x.codes + place * Group * 16, dots);
        for (int j = 0; j < 4; j++) {
          const int output = n + (i + j < width ? i + j : 0), zero = w.zero_point(output, g) - kZero<Bits>;
          for (int row = 0; row < 16; row++) dots[j][row] -= zero * row_sums[row];
          const Lanes both = multiply(broadcast(w.scales[static_cast<size_t>(output) * groups + g]), row_scales);
          float* const sum = sums + (i + j) * kPanelRows + (p - first) * 16;
          store(sum, fused(load(dots[j]), both, load(sum)));
        }
      }
    }
  }
}

// Rows row .. row + 15, where those outside of `out` are left alone; outputs n .. n + width - 1.
void write_panel(const Output& out, const float* sums, int row, int n, int width) {
  for (int i = 0; i < 16; i++) {
    if (row + i < out.first || row + i >= out.last) continue;
    float values[kPanelOutputs];
    for (int j = 0; j < kPanelOutputs; j++) values[j] = sums[j * kPanelRows + i];
    for (int half = 0; half < width; half += 16) write_lanes(out, row + i, n + half, width - half, load(values + half));
  }
}

template <int Bits, int Group>
void panels(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  alignas(64) float sums[kPanelOutputs * kPanelRows];
  const int first = out.first / 16, last = (out.last + 15) / 16;
  for (int p = first; p < last; p += kPanelRows / 16) {
    const int until = p + kPanelRows / 16 < last ? p + kPanelRows / 16 : last;
    for (int n = begin; n < end; n += kPanelOutputs) {
      const int width = end - n < kPanelOutputs ? end - n : kPanelOutputs;
      __builtin_memset(sums, 0, sizeof sums);
      add_panels<Bits, Group>(w, x, n, width, p, until, sums);
      for (int i = p; i < until; i++) write_panel(out, sums + (i - p) * 16, i * 16, n, width);
    }
  }
}

void integer_product(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  by_shape(w, [&](auto bits, auto group) {
    if (x.panels)
      panels<bits.value, group.value>(w, x, begin, end, out);
    else
      few_rows<bits.value, group.value>(w, x, begin, end, out);
  });
}

// What every product of panels does around its dots: sums [32 outputs][kPanelRows] of a block begin as zeros, and are
// turned into rows and written.

constexpr int kPanelRows = 256;  // rows whose sums stay in the first-level cache
constexpr int kPanelOutputs = 32;

inline void transpose(__m512* r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; i++) {
    const __m512 ac = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), bd = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 eg = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88),
                 fh = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(ac, eg, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(ac, eg, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(bd, fh, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(bd, fh, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Rows row .. row + 15, where those outside of `out` are left alone; outputs n .. n + width - 1.
void write_panel(const Output& out, const float* sums, int row, int n, int width) {
  for (int half = 0; half < width; half += 16) {
    __m512 r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_ps(sums + (half + i) * kPanelRows);
    transpose(r);
    for (int i = 0; i < 16; i++)
      if (row + i >= out.first && row + i < out.last) write_lanes(out, row + i, n + half, width - half, Lanes{r[i]});
  }
}

// Calls block(n, width, first, last, sums) for 32 outputs from n on, of which `width` are wanted, and panels first <= p
// < last, and writes the sums that it adds.
template <class Block>
void each_block(int begin, int end, const Output& out, const Block& block) {
  alignas(64) float sums[kPanelOutputs * kPanelRows];
  const int first = out.first / 16, last = (out.last + 15) / 16;
  for (int p = first; p < last; p += kPanelRows / 16) {
    const int until = p + kPanelRows / 16 < last ? p + kPanelRows / 16 : last;
    for (int n = begin; n < end; n += kPanelOutputs) {
      const int width = end - n < kPanelOutputs ? end - n : kPanelOutputs;
      for (int i = 0; i < kPanelOutputs; i++)
        for (int j = 0; j < until - p; j++) _mm512_store_ps(sums + i * kPanelRows + 16 * j, _mm512_setzero_ps());
      block(n, width, p, until, sums);
      for (int i = p; i < until; i++) write_panel(out, sums + (i - p) * 16, i * 16, n, width);
    }
  }
}

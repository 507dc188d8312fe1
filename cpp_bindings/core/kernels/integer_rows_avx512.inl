// Products of one row, or a few, with AVX-512 VNNI: weights are read once, in place, and meet every row.
//
// A register sums 16 parts of one (output, group) pair. Four outputs by four groups of them are turned into one
// register of whole sums, lane 4 * group + output, and enter the float sums group by group.

// The 64, 32 or 16 bytes of a group as codes in the order of the activations: `low` the first 64 of them, `high` the
// rest.
struct Unpacked {
  __m512i low, high;
};

template <int Bits, int Group>
inline Unpacked unpack_group(const uint8_t* w) {
  const __m512i mask = _mm512_set1_epi8(15), none = _mm512_setzero_si512();
  if constexpr (Bits == 4 && Group == 128) {
    const __m512i bytes = _mm512_loadu_si512(w);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
  } else if constexpr (Bits == 4 && Group == 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
    return {_mm512_and_si512(both, mask), none};
  } else if constexpr (Bits == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
    return {_mm512_and_si512(_mm512_zextsi256_si512(both), mask), none};
  } else if constexpr (Group == 128) {
    return {_mm512_loadu_si512(w), _mm512_loadu_si512(w + 64)};
  } else if constexpr (Group == 64) {
    return {_mm512_loadu_si512(w), none};
  } else {
    return {_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))), none};
  }
}

template <int Group>
inline __m512i dot_group(const Unpacked& w, const int8_t* x, __m512i sum) {
  if constexpr (Group == 32) {
    return _mm512_dpbusd_epi32(sum, w.low,
                               _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
  } else {
    sum = _mm512_dpbusd_epi32(sum, w.low, _mm512_loadu_si512(x));
    if constexpr (Group == 128) sum = _mm512_dpbusd_epi32(sum, w.high, _mm512_loadu_si512(x + 64));
    return sum;
  }
}

inline __m512i added_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
inline __m512i added_quads(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
inline __m512i added_halves(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Parts of the sums of four outputs -> a quarter of each in lanes 4 * i + output.
inline __m512i quarter_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  return added_quads(added_pairs(a, b), added_pairs(c, d));
}

// quarters[group] -> whole sums in lane 4 * group + output.
inline __m512i whole_sums(const __m512i* quarters) {
  return added_halves(added_halves(quarters[0], quarters[1]), added_halves(quarters[2], quarters[3]));
}

// Scales [4 outputs][count <= 4 groups] at `scales`, rows `stride` apart -> lane 4 * group + output.
inline __m512 output_scales(const float* scales, const size_t* offsets, int count) {
  const __mmask8 kept = static_cast<__mmask8>((1 << count) - 1);
  __m512 rows = _mm512_castps128_ps512(_mm_maskz_loadu_ps(kept, scales + offsets[0]));
  rows = _mm512_insertf32x4(rows, _mm_maskz_loadu_ps(kept, scales + offsets[1]), 1);
  rows = _mm512_insertf32x4(rows, _mm_maskz_loadu_ps(kept, scales + offsets[2]), 2);
  rows = _mm512_insertf32x4(rows, _mm_maskz_loadu_ps(kept, scales + offsets[3]), 3);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, rows);
}

// Values of four groups -> each in the four lanes of its group.
inline __m512i repeated(const void* values, int count) {
  const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __mmask16 kept = static_cast<__mmask16>((1 << count) - 1);
  return _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi32(kept, values));
}

template <int Bits, int Group, int R>
struct RowProduct {
  const IntegerMatrix& w;
  const Activations& x;
  const Output& out;
  int ahead;  // outputs whose weights are fetched ahead: the hardware's own prefetching stops at the end of a page

  // What the zero points of four outputs and four groups take off, in units of the activations' sums.
  __m512i zeros(const int* outputs, int g, int count) const {
    if (w.zero_points == nullptr) return _mm512_set1_epi32(1 << (Bits - 1));
    int32_t values[16] = {};
    for (int j = 0; j < count; j++)
      for (int i = 0; i < 4; i++) values[4 * j + i] = w.zero_point(outputs[i], g + j);
    return _mm512_loadu_si512(values);
  }

  // Groups g .. g + count - 1 of four outputs.
  inline __attribute__((always_inline)) void add_groups(const int* outputs, const size_t* scales, int g, int count,
                                                        int row, __m128* sums) const {
    __m512i quarters[R][4];
    for (int j = 0; j < 4; j++) {
      if (j >= count) {
        for (int r = 0; r < R; r++) quarters[r][j] = _mm512_setzero_si512();
        continue;
      }
      Unpacked codes[4];
      for (int i = 0; i < 4; i++) {
        const uint8_t* bytes = w.codes + outputs[i] * w.row_bytes() + (g + j) * w.group_bytes();
        _mm_prefetch(reinterpret_cast<const char*>(bytes + ahead * w.row_bytes()), _MM_HINT_T0);
        codes[i] = unpack_group<Bits, Group>(bytes);
      }
      for (int r = 0; r < R; r++) {
        const int8_t* q = x.codes + (static_cast<size_t>(row + r) * x.groups + g + j) * Group;
        const __m512i none = _mm512_setzero_si512();
        quarters[r][j] = quarter_sums(dot_group<Group>(codes[0], q, none), dot_group<Group>(codes[1], q, none),
                                      dot_group<Group>(codes[2], q, none), dot_group<Group>(codes[3], q, none));
      }
    }
    for (int i = 0; i < 4; i++)
      _mm_prefetch(reinterpret_cast<const char*>(w.scales + scales[i] + ahead * w.groups() + g), _MM_HINT_T0);
    const __m512 weights = output_scales(w.scales + g, scales, count);
    const __m512i zero = zeros(outputs, g, count);
    for (int r = 0; r < R; r++) {
      const size_t place = static_cast<size_t>(row + r) * x.groups + g;
      const __m512i taken = _mm512_mullo_epi32(zero, repeated(x.sums + place, count));
      const __m512 dots = _mm512_cvtepi32_ps(_mm512_sub_epi32(whole_sums(quarters[r]), taken));
      const __m512 both = _mm512_mul_ps(weights, _mm512_castsi512_ps(repeated(x.scales + place, count)));
      sums[r] = _mm_fmadd_ps(_mm512_castps512_ps128(dots), _mm512_castps512_ps128(both), sums[r]);
      if (count > 1) sums[r] = _mm_fmadd_ps(_mm512_extractf32x4_ps(dots, 1), _mm512_extractf32x4_ps(both, 1), sums[r]);
      if (count > 2) sums[r] = _mm_fmadd_ps(_mm512_extractf32x4_ps(dots, 2), _mm512_extractf32x4_ps(both, 2), sums[r]);
      if (count > 3) sums[r] = _mm_fmadd_ps(_mm512_extractf32x4_ps(dots, 3), _mm512_extractf32x4_ps(both, 3), sums[r]);
    }
  }

  // Four outputs, the first `step` apart from the second and so on; those from `end` on are not written.
  void four(int first, int step, int end, int row) const {
    const int groups = w.groups();
    int outputs[4];
    size_t scales[4];
    for (int i = 0; i < 4; i++) {
      outputs[i] = first + i * step < end ? first + i * step : end - 1;
      scales[i] = static_cast<size_t>(outputs[i]) * groups;
    }
    __m128 sums[R];
    for (int r = 0; r < R; r++) sums[r] = _mm_setzero_ps();
    int g = 0;
    for (; g + 4 <= groups; g += 4) add_groups(outputs, scales, g, 4, row, sums);
    if (g < groups) add_groups(outputs, scales, g, groups - g, row, sums);
    for (int r = 0; r < R; r++) {
      float y[4];
      _mm_storeu_ps(y, sums[r]);
      for (int i = 0; i < 4 && first + i * step < end; i++) write_one(out, row + r, first + i * step, y[i]);
    }
  }

  // Memory is read faster in several streams: the outputs of each quarter are one.
  void run(int begin, int end, int row) const {
    const int quarter = (end - begin + 3) / 4;
    for (int n = begin; n < begin + quarter; n++) four(n, quarter, end, row);
  }
};

template <int Bits, int Group>
void rows_product(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  // More than four rows see a piece of the weights before the next one is read: it is in the cache then.
  const bool pieces = out.last - out.first > 4;
  const int piece = pieces ? 16 : end - begin, ahead = pieces ? 12 : 2;
  for (int n = begin; n < end; n += piece) {
    const int last = n + piece < end ? n + piece : end;
    int row = out.first;
    for (; row + 4 <= out.last; row += 4) RowProduct<Bits, Group, 4>{w, x, out, ahead}.run(n, last, row);
    switch (out.last - row) {
      case 3:
        RowProduct<Bits, Group, 3>{w, x, out, ahead}.run(n, last, row);
        break;
      case 2:
        RowProduct<Bits, Group, 2>{w, x, out, ahead}.run(n, last, row);
        break;
      case 1:
        RowProduct<Bits, Group, 1>{w, x, out, ahead}.run(n, last, row);
        break;
    }
  }
}

void few_rows(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  by_shape(w, [&](auto bits, auto group) { rows_product<bits.value, group.value>(w, x, begin, end, out); });
}

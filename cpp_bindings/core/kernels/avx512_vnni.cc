// AVX-512 with VNNI: dot products of four int8 in every lane.
#include "../kernels.h"
#include "lanes_avx512.h"

namespace owl2 {
namespace {

#include "output.inl"
#include "rows.inl"
#include "attention.inl"
#include "dense.inl"
#include "roof.inl"
#include "by_shape.inl"
#include "integer_rows_avx512.inl"
#include "panels_avx512.inl"

// gcc 12 moves the sums of the intrinsic through memory in every step.
#define OWL2_DOT(sum, weights, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x))

// Codes [outputs][group] of a group, unsigned, in the order of the activations.
template <int Bits, int Group>
inline void unpack_weights(const IntegerMatrix& w, int n, int width, int g, uint8_t* codes) {
  const size_t row_bytes = w.row_bytes();
  const uint8_t* bytes = w.codes + n * row_bytes + g * w.group_bytes();
  for (int i = 0; i < kPanelOutputs; i++) {
    const uint8_t* const row = bytes + (i < width ? i : 0) * row_bytes;
    _mm_prefetch(reinterpret_cast<const char*>(row) + kPanelOutputs * row_bytes, _MM_HINT_T1);
    const Unpacked part = unpack_group<Bits, Group>(row);
    if constexpr (Group == 32) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + i * Group), _mm512_castsi512_si256(part.low));
    } else {
      _mm512_store_si512(codes + i * Group, part.low);
      if constexpr (Group == 128) _mm512_store_si512(codes + i * Group + 64, part.high);
    }
  }
}

// Eight outputs by 16 or 32 rows: dots[output][half of the rows].
template <int Group, int Panels>
inline __attribute__((always_inline)) void dot_tile(const uint8_t* w, const int8_t* x, size_t panel_step,
                                                    const __m512i* start, __m512i dots[][2]) {
  __m512i a0 = start[0], a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
  __m512i b0 = start[1], b1 = b0, b2 = b0, b3 = b0, b4 = b0, b5 = b0, b6 = b0, b7 = b0;
  for (int k = 0; k < Group; k += 4, x += 64) {
    const __m512i x0 = _mm512_loadu_si512(x);
    const __m512i x1 = Panels == 2 ? _mm512_loadu_si512(x + panel_step) : x0;
    __m512i c;
#define OWL2_STEP(i)                                  \
  {                                                   \
    int32_t four;                                     \
    __builtin_memcpy(&four, w + i * Group + k, 4);    \
    c = _mm512_set1_epi32(four);                      \
    OWL2_DOT(a##i, c, x0);                            \
    if constexpr (Panels == 2) OWL2_DOT(b##i, c, x1); \
  }
    OWL2_STEP(0) OWL2_STEP(1) OWL2_STEP(2) OWL2_STEP(3) OWL2_STEP(4) OWL2_STEP(5) OWL2_STEP(6) OWL2_STEP(7)
#undef OWL2_STEP
  }
#define OWL2_KEEP(i) dots[i][0] = a##i, dots[i][1] = b##i;
  OWL2_KEEP(0) OWL2_KEEP(1) OWL2_KEEP(2) OWL2_KEEP(3) OWL2_KEEP(4) OWL2_KEEP(5) OWL2_KEEP(6) OWL2_KEEP(7)
#undef OWL2_KEEP
}

// Adds a group of 32 outputs and one or two panels to sums [32][kPanelRows].
template <int Bits, int Group, int Panels>
void add_group(const IntegerMatrix& w, const Activations& x, int n, int width, int g, int panel, const uint8_t* codes,
               float* sums) {
  const int groups = w.groups();
  const size_t place = static_cast<size_t>(panel) * groups + g, next = place + groups;
  const size_t places[2] = {place, Panels == 2 ? next : place};
  __m512i row_sums[2], start[2];
  __m512 row_scales[2];
  for (int h = 0; h < 2; h++) {
    row_sums[h] = _mm512_loadu_si512(x.sums + places[h] * 16);
    row_scales[h] = _mm512_loadu_ps(x.scales + places[h] * 16);
    start[h] = w.zero_points != nullptr ? _mm512_setzero_si512()
                                        : _mm512_mullo_epi32(row_sums[h], _mm512_set1_epi32(-(1 << (Bits - 1))));
  }
  for (int i = 0; i < kPanelOutputs; i += 8) {
    __m512i dots[8][2];
    dot_tile<Group, Panels>(codes + i * Group, x.codes + place * Group * 16, static_cast<size_t>(groups) * Group * 16,
                            start, dots);
    for (int j = 0; j < 8; j++) {
      const int output = n + (i + j < width ? i + j : 0);
      const __m512 weight = _mm512_set1_ps(w.scales[static_cast<size_t>(output) * groups + g]);
      for (int h = 0; h < Panels; h++) {
        __m512i dot = dots[j][h];
        if (w.zero_points != nullptr)
          dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(row_sums[h], _mm512_set1_epi32(w.zero_point(output, g))));
        float* const sum = sums + (i + j) * kPanelRows + 16 * h;
        const __m512 both = _mm512_mul_ps(weight, row_scales[h]);
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, _mm512_load_ps(sum)));
      }
    }
  }
}

template <int Bits, int Group>
void panels_block(const IntegerMatrix& w, const Activations& x, int n, int width, int first, int last, float* sums) {
  alignas(64) uint8_t codes[kPanelOutputs * Group];
  for (int g = 0; g < w.groups(); g++) {
    unpack_weights<Bits, Group>(w, n, width, g, codes);
    int p = first;
    for (; p + 2 <= last; p += 2) add_group<Bits, Group, 2>(w, x, n, width, g, p, codes, sums + (p - first) * 16);
    if (p < last) add_group<Bits, Group, 1>(w, x, n, width, g, p, codes, sums + (p - first) * 16);
  }
}

void integer_product(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  if (!x.panels) return few_rows(w, x, begin, end, out);
  by_shape(w, [&](auto bits, auto group) {
    each_block(begin, end, out, [&](int n, int width, int first, int last, float* sums) {
      panels_block<bits.value, group.value>(w, x, n, width, first, last, sums);
    });
  });
}

uint64_t int8_loop(int rounds) {
  const __m512i codes = _mm512_set1_epi8(1);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
  for (int round = 0; round < rounds; round++) {
    OWL2_DOT(a, codes, codes);
    OWL2_DOT(b, codes, codes);
    OWL2_DOT(c, codes, codes);
    OWL2_DOT(d, codes, codes);
    OWL2_DOT(e, codes, codes);
    OWL2_DOT(f, codes, codes);
    OWL2_DOT(g, codes, codes);
    OWL2_DOT(h, codes, codes);
    OWL2_DOT(i, codes, codes);
    OWL2_DOT(j, codes, codes);
    OWL2_DOT(k, codes, codes);
    OWL2_DOT(l, codes, codes);
  }
  // The result is used, so that the loop stays.
  const __m512i some = _mm512_or_si512(_mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d)),
                                       _mm512_or_si512(_mm512_or_si512(e, f), _mm512_or_si512(g, h)));
  const __m512i all = _mm512_or_si512(some, _mm512_or_si512(_mm512_or_si512(i, j), _mm512_or_si512(k, l)));
  return _mm512_reduce_or_epi32(all) == -1 ? 0 : static_cast<uint64_t>(rounds) * 12 * 64;
}

}  // namespace

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = {"avx512_vnni", 9,      rms_norm,        quantize, integer_product, dense_product,
                             silu_gate,     rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

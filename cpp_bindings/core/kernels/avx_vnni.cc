// AVX2 with the dot products of VNNI in 256 bits: processors without AVX-512.
#include "../kernels.h"
#include "lanes_avx2.h"

namespace owl2 {
namespace {

#include "output.inl"
#include "rows.inl"
#include "attention.inl"
#include "dense.inl"
#include "roof.inl"
#include "by_shape.inl"
#include "bytes_avx2.inl"

// gcc 12 moves the sums of the intrinsic through memory in every step.
#define OWL2_DOT(sum, codes, x) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x))

template <int Bits, int Group>
inline Sums dot(const Bytes* codes, const int8_t* x) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < Group / 32; i++) OWL2_DOT(sum, codes[i], load_bytes(x + 32 * i));
  return sum;
}

template <int Bits, int Group>
inline void dot_panel(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  __m256i sums[4][2] = {};
  for (int k = 0; k < Group; k += 4) {
    const __m256i low = load_bytes(x + k * 16), high = load_bytes(x + k * 16 + 32);
    for (int i = 0; i < 4; i++) {
      int32_t four;
      __builtin_memcpy(&four, codes + i * Group + k, 4);
      const __m256i all = _mm256_set1_epi32(four);
      OWL2_DOT(sums[i][0], all, low);
      OWL2_DOT(sums[i][1], all, high);
    }
  }
  for (int i = 0; i < 4; i++)
    for (int h = 0; h < 2; h++) _mm256_store_si256(reinterpret_cast<__m256i*>(dots[i] + 8 * h), sums[i][h]);
}

#include "integer_product.inl"

uint64_t int8_loop(int rounds) {
  const __m256i codes = _mm256_set1_epi8(1);
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a;
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
  }
  // The result is used, so that the loop stays.
  const __m256i some = _mm256_or_si256(_mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)),
                                       _mm256_or_si256(_mm256_or_si256(e, f), _mm256_or_si256(g, h)));
  const __m256i all = _mm256_or_si256(some, _mm256_or_si256(i, j));
  return _mm256_testz_si256(all, all) + static_cast<uint64_t>(rounds) * 10 * 32;
}

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = {"avx_vnni", 8,      rms_norm,        quantize, integer_product, dense_product,
                          silu_gate,  rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

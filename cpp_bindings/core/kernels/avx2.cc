// AVX2 with FMA and F16C: products of pairs of int8 in 16 bits.
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

// Eight bits times eight bits in pairs, which do not fit 16 bits, as 16 times 16.
inline __m256i dot_wide(__m256i codes, __m256i x, __m256i sum) {
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
  return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
}

template <int Bits, int Group>
inline Sums dot(const Bytes* codes, const int8_t* x) {
  __m256i sum = _mm256_setzero_si256();
  if constexpr (Bits == 4) {
    // A pair is 2 * 15 * 127 at most, so that eight of them fit 16 bits.
    for (int i = 0; i < Group / 32; i++)
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes[i], load_bytes(x + 32 * i)));
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  } else {
    for (int i = 0; i < Group / 32; i++) sum = dot_wide(codes[i], load_bytes(x + 32 * i), sum);
    return sum;
  }
}

// Four codes for each of four outputs, in all lanes.
inline __m256i four_codes(const uint8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

template <int Group>
inline void dot_panel_4(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i whole[4][2] = {};
  for (int k = 0; k < Group; k += 32) {
    __m256i sums[4][2] = {};
    for (int step = k; step < k + 32; step += 4) {
      const __m256i low = load_bytes(x + step * 16), high = load_bytes(x + step * 16 + 32);
      for (int i = 0; i < 4; i++) {
        const __m256i four = four_codes(codes + i * Group + step);
        sums[i][0] = _mm256_add_epi16(sums[i][0], _mm256_maddubs_epi16(four, low));
        sums[i][1] = _mm256_add_epi16(sums[i][1], _mm256_maddubs_epi16(four, high));
      }
    }
    for (int i = 0; i < 4; i++)
      for (int h = 0; h < 2; h++) whole[i][h] = _mm256_add_epi32(whole[i][h], _mm256_madd_epi16(sums[i][h], ones));
  }
  for (int i = 0; i < 4; i++)
    for (int h = 0; h < 2; h++) _mm256_store_si256(reinterpret_cast<__m256i*>(dots[i] + 8 * h), whole[i][h]);
}

// Eight rows of four int8 as two registers of int16; the pairs of a row are added in the end.
template <int Group>
inline void dot_panel_8(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  for (int i = 0; i < 4; i++) {
    for (int h = 0; h < 2; h++) {
      __m256i first = _mm256_setzero_si256(), second = first;
      for (int k = 0; k < Group; k += 4) {
        const __m256i four = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(four_codes(codes + i * Group + k)));
        const __m256i rows = load_bytes(x + k * 16 + 32 * h);
        first = _mm256_add_epi32(first, _mm256_madd_epi16(four, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(rows))));
        second =
            _mm256_add_epi32(second, _mm256_madd_epi16(four, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(rows, 1))));
      }
      const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(dots[i] + 8 * h), sums);
    }
  }
}

template <int Bits, int Group>
inline void dot_panel(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  if constexpr (Bits == 4)
    dot_panel_4<Group>(codes, x, dots);
  else
    dot_panel_8<Group>(codes, x, dots);
}

#include "integer_product.inl"

uint64_t int8_loop(int rounds) {
  const __m256i codes = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  __m256i sums[8] = {};
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < 8; i++)
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(codes, _mm256_xor_si256(codes, sums[i])));
  __m256i all = sums[0];
  for (int i = 1; i < 8; i++) all = _mm256_or_si256(all, sums[i]);
  // The result is used, so that the loop stays.
  return _mm256_testz_si256(all, ones) + static_cast<uint64_t>(rounds) * 8 * 32;
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2",    12,     rms_norm,        quantize, integer_product, dense_product,
                       silu_gate, rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

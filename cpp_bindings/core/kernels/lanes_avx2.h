// Lanes in two registers of AVX2.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace owl2 {
namespace {

struct Lanes {
  __m256 low, high;
};

// Independent sums that keep the arithmetic busy and fit the registers.
constexpr int kRoofSums = 6;

inline Lanes broadcast(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Lanes load(const float* x) {
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
inline Lanes load(const uint16_t* x) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8)))};
}
inline Lanes load(const int8_t* x) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
inline Lanes load(const int32_t* x) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))),
          _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8)))};
}
inline void store(float* y, Lanes x) {
  _mm256_storeu_ps(y, x.low);
  _mm256_storeu_ps(y + 8, x.high);
}
inline void store(uint16_t* y, Lanes x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 8), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes add(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Lanes subtract(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Lanes multiply(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Lanes divide(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes maximum(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Lanes minimum(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline __m256 larger_magnitude(__m256 a, __m256 b) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i x = _mm256_and_si256(_mm256_castps_si256(a), mask), y = _mm256_and_si256(_mm256_castps_si256(b), mask);
  return _mm256_castsi256_ps(_mm256_max_epu32(x, y));
}
inline Lanes largest_magnitude(Lanes a, Lanes b) {
  return {larger_magnitude(a.low, b.low), larger_magnitude(a.high, b.high)};
}
inline Lanes filled_from(Lanes x, int count, float value) {
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), first = _mm256_set1_epi32(count);
  const __m256 fill = _mm256_set1_ps(value);
  const __m256i low = _mm256_cmpgt_epi32(first, places);
  const __m256i high = _mm256_cmpgt_epi32(first, _mm256_add_epi32(places, _mm256_set1_epi32(8)));
  return {_mm256_blendv_ps(fill, x.low, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(fill, x.high, _mm256_castsi256_ps(high))};
}
inline __m256 power_of_two(__m256 shifted) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x4b400000 - 127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}
inline Lanes times_power_of_two(Lanes x, Lanes shifted) {
  return {_mm256_mul_ps(x.low, power_of_two(shifted.low)), _mm256_mul_ps(x.high, power_of_two(shifted.high))};
}
inline float sum(Lanes x) {
  const __m256 y = _mm256_add_ps(x.low, x.high);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float largest(Lanes x) {
  const __m256 y = _mm256_max_ps(x.low, x.high);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
inline float largest_bits(Lanes x) {
  const __m256i most = _mm256_castps_si256(larger_magnitude(x.low, x.high));
  __m128i z = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  z = _mm_max_epu32(z, _mm_unpackhi_epi64(z, z));
  z = _mm_max_epu32(z, _mm_srli_epi64(z, 32));
  return _mm_cvtss_f32(_mm_castsi128_ps(z));
}
inline int32_t store_rounded(int8_t* y, Lanes x) {
  const __m256i low = _mm256_cvtps_epi32(x.low), high = _mm256_cvtps_epi32(x.high);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), codes);
  const __m256i all = _mm256_add_epi32(low, high);
  __m128i z = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  z = _mm_add_epi32(z, _mm_unpackhi_epi64(z, z));
  return _mm_cvtsi128_si32(_mm_add_epi32(z, _mm_srli_epi64(z, 32)));
}

#include "lanes.h"

}  // namespace
}  // namespace owl2

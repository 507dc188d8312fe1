// Lanes in one register of AVX-512.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace owl2 {
namespace {

struct Lanes {
  __m512 v;
};

// Independent sums that keep the arithmetic busy and fit the registers.
constexpr int kRoofSums = 12;

inline Lanes broadcast(float x) {
  return {_mm512_set1_ps(x)};
}
inline Lanes load(const float* x) {
  return {_mm512_loadu_ps(x)};
}
inline Lanes load(const uint16_t* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}
inline Lanes load(const int8_t* x) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))))};
}
inline void store(float* y, Lanes x) {
  _mm512_storeu_ps(y, x.v);
}
inline void store(uint16_t* y, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes add(Lanes a, Lanes b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline Lanes subtract(Lanes a, Lanes b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline Lanes multiply(Lanes a, Lanes b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline Lanes divide(Lanes a, Lanes b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Lanes maximum(Lanes a, Lanes b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline Lanes minimum(Lanes a, Lanes b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline Lanes largest_magnitude(Lanes a, Lanes b) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  const __m512i x = _mm512_and_si512(_mm512_castps_si512(a.v), mask);
  const __m512i y = _mm512_and_si512(_mm512_castps_si512(b.v), mask);
  return {_mm512_castsi512_ps(_mm512_max_epu32(x, y))};
}
inline Lanes filled_from(Lanes x, int count, float value) {
  const __mmask16 kept = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  return {_mm512_mask_blend_ps(kept, _mm512_set1_ps(value), x.v)};
}
inline Lanes times_power_of_two(Lanes x, Lanes shifted) {
  const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(0x4b400000 - 127));
  return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(_mm512_slli_epi32(n, 23)))};
}
inline __m256 upper(__m512 x) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}
inline float sum(Lanes x) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x.v), upper(x.v));
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float largest(Lanes x) {
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x.v), upper(x.v));
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
inline float largest_bits(Lanes x) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
  const uint32_t most = _mm512_reduce_max_epu32(bits);
  float result;
  __builtin_memcpy(&result, &most, 4);
  return result;
}
inline int32_t store_rounded(int8_t* y, Lanes x) {
  const __m512i rounded = _mm512_cvtps_epi32(x.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtsepi32_epi8(rounded));
  return _mm512_reduce_add_epi32(rounded);
}

#include "lanes.h"

}  // namespace
}  // namespace owl2

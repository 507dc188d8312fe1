// Lanes in four registers of NEON.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace owl2 {
namespace {

struct Lanes {
  float32x4_t v[4];
};

// Independent sums that keep the arithmetic busy and fit the registers.
constexpr int kRoofSums = 5;

template <class F>
inline Lanes each(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Lanes broadcast(float x) {
  const float32x4_t y = vdupq_n_f32(x);
  return {{y, y, y, y}};
}
inline Lanes load(const float* x) {
  return each([=](int i) { return vld1q_f32(x + 4 * i); });
}
inline Lanes load(const uint16_t* x) {
  return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4 * i))); });
}
inline Lanes load(const int8_t* x) {
  const int8x16_t codes = vld1q_s8(x);
  const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline Lanes load(const int32_t* x) {
  return each([=](int i) { return vcvtq_f32_s32(vld1q_s32(x + 4 * i)); });
}
inline void store(float* y, Lanes x) {
  for (int i = 0; i < 4; i++) vst1q_f32(y + 4 * i, x.v[i]);
}
inline void store(uint16_t* y, Lanes x) {
  for (int i = 0; i < 4; i++) vst1_u16(y + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline Lanes add(Lanes a, Lanes b) {
  return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Lanes subtract(Lanes a, Lanes b) {
  return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Lanes multiply(Lanes a, Lanes b) {
  return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Lanes divide(Lanes a, Lanes b) {
  return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// Of NaN the second, as on other processors.
inline float32x4_t larger(float32x4_t a, float32x4_t b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}
inline Lanes maximum(Lanes a, Lanes b) {
  return each([&](int i) { return larger(a.v[i], b.v[i]); });
}
inline Lanes minimum(Lanes a, Lanes b) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline uint32x4_t magnitude(float32x4_t x) {
  return vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7fffffff));
}
inline Lanes largest_magnitude(Lanes a, Lanes b) {
  return each([&](int i) { return vreinterpretq_f32_u32(vmaxq_u32(magnitude(a.v[i]), magnitude(b.v[i]))); });
}
inline Lanes filled_from(Lanes x, int count, float value) {
  const int32_t first[4] = {0, 1, 2, 3};
  const int32x4_t places = vld1q_s32(first);
  return each(
      [&](int i) { return vbslq_f32(vcltq_s32(places, vdupq_n_s32(count - 4 * i)), x.v[i], vdupq_n_f32(value)); });
}
inline Lanes times_power_of_two(Lanes x, Lanes shifted) {
  return each([&](int i) {
    const int32x4_t n = vsubq_s32(vreinterpretq_s32_f32(shifted.v[i]), vdupq_n_s32(0x4b400000 - 127));
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(n, 23)));
  });
}
inline float sum(Lanes x) {
  const float32x4_t y = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t z = vadd_f32(vget_low_f32(y), vget_high_f32(y));
  return vget_lane_f32(z, 0) + vget_lane_f32(z, 1);
}
inline float largest(Lanes x) {
  const float32x4_t y = larger(larger(x.v[0], x.v[2]), larger(x.v[1], x.v[3]));
  const float32x4_t z = larger(y, vextq_f32(y, y, 2));
  const float first = vgetq_lane_f32(z, 0), second = vgetq_lane_f32(z, 1);
  return first > second ? first : second;
}
inline float largest_bits(Lanes x) {
  const Lanes y = largest_magnitude({{x.v[0], x.v[1], x.v[0], x.v[1]}}, {{x.v[2], x.v[3], x.v[2], x.v[3]}});
  const uint32_t most = vmaxvq_u32(vmaxq_u32(vreinterpretq_u32_f32(y.v[0]), vreinterpretq_u32_f32(y.v[1])));
  float result;
  __builtin_memcpy(&result, &most, 4);
  return result;
}
// Where x is no number the conversion gives 0, elsewhere what does not fit int8 becomes 127 or -128: no magnitude above
// 127 comes here.
inline int32_t store_rounded(int8_t* y, Lanes x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[0])), vqmovn_s32(vcvtnq_s32_f32(x.v[1])));
  const int16x8_t high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[2])), vqmovn_s32(vcvtnq_s32_f32(x.v[3])));
  vst1q_s8(y, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  return vaddlvq_s16(low) + vaddlvq_s16(high);
}

#include "lanes.h"

}  // namespace
}  // namespace owl2

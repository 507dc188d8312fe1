// NEON: every 64-bit Arm.
#include "../kernels.h"
#include "lanes_neon.h"

namespace owl2 {
namespace {

#include "output.inl"
#include "rows.inl"
#include "attention.inl"
#include "dense.inl"
#include "roof.inl"
#include "by_shape.inl"
#include "bytes_neon.inl"

// Products of 16 pairs, neighbours added.
inline int32x4_t add_products(int32x4_t sum, int8x16_t a, int8x16_t b) {
  sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  return vpadalq_s16(sum, vmull_high_s8(a, b));
}

template <int Bits, int Group>
inline Sums dot(const Bytes* codes, const int8_t* x) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < Group / 16; i++) sum = add_products(sum, codes[i], vld1q_s8(x + 16 * i));
  return sum;
}

template <int Bits, int Group>
inline void dot_panel(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  for (int i = 0; i < 4; i++) {
    int32x4_t halves[4][2];  // of four rows each: pairs of the first two, pairs of the others
    for (int q = 0; q < 4; q++) halves[q][0] = halves[q][1] = vdupq_n_s32(0);
    for (int k = 0; k < Group; k += 4) {
      const int8x16_t four = four_codes(codes + i * Group + k);
      for (int q = 0; q < 4; q++) {
        const int8x16_t rows = vld1q_s8(x + k * 16 + 16 * q);
        halves[q][0] = vpadalq_s16(halves[q][0], vmull_s8(vget_low_s8(four), vget_low_s8(rows)));
        halves[q][1] = vpadalq_s16(halves[q][1], vmull_high_s8(four, rows));
      }
    }
    for (int q = 0; q < 4; q++) vst1q_s32(dots[i] + 4 * q, vpaddq_s32(halves[q][0], halves[q][1]));
  }
}

#include "integer_product.inl"

uint64_t int8_loop(int rounds) {
  const int8x16_t codes = vdupq_n_s8(1);
  int32x4_t sums[8];
  for (int i = 0; i < 8; i++) sums[i] = vdupq_n_s32(i);
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < 8; i++) sums[i] = add_products(sums[i], codes, codes);
  int32x4_t all = sums[0];
  for (int i = 1; i < 8; i++) all = vorrq_s32(all, sums[i]);
  // The result is used, so that the loop stays.
  return (vmaxvq_s32(all) == 0) + static_cast<uint64_t>(rounds) * 8 * 16;
}

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon",    12,     rms_norm,        quantize, integer_product, dense_product,
                       silu_gate, rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

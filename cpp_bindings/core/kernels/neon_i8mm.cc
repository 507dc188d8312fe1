// NEON with products of 2 x 8 by 8 x 2 matrices of int8, for panels; single rows as with the dot products.
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

template <int Bits, int Group>
inline Sums dot(const Bytes* codes, const int8_t* x) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < Group / 16; i++) sum = vdotq_s32(sum, codes[i], vld1q_s8(x + 16 * i));
  return sum;
}

// Eight columns of two outputs: [2][8].
inline int8x16_t two_outputs(const uint8_t* first, const uint8_t* second) {
  return vreinterpretq_s8_u8(vcombine_u8(vld1_u8(first), vld1_u8(second)));
}

template <int Bits, int Group>
inline void dot_panel(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  int32x4_t sums[2][8];  // of two outputs and two rows: [output][row]
  for (int i = 0; i < 2; i++)
    for (int q = 0; q < 8; q++) sums[i][q] = vdupq_n_s32(0);
  for (int k = 0; k < Group; k += 8) {
    const int8x16_t w[2] = {two_outputs(codes + k, codes + Group + k),
                            two_outputs(codes + 2 * Group + k, codes + 3 * Group + k)};
    for (int q = 0; q < 4; q++) {
      // Four rows of four columns, and of the next four.
      const int32x4_t early = vreinterpretq_s32_s8(vld1q_s8(x + k * 16 + 16 * q));
      const int32x4_t late = vreinterpretq_s32_s8(vld1q_s8(x + (k + 4) * 16 + 16 * q));
      const int8x16_t rows[2] = {vreinterpretq_s8_s32(vzip1q_s32(early, late)),
                                 vreinterpretq_s8_s32(vzip2q_s32(early, late))};
      for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) sums[i][2 * q + h] = vmmlaq_s32(sums[i][2 * q + h], w[i], rows[h]);
    }
  }
  for (int i = 0; i < 2; i++)
    for (int q = 0; q < 8; q++) {
      vst1_s32(dots[2 * i] + 2 * q, vget_low_s32(sums[i][q]));
      vst1_s32(dots[2 * i + 1] + 2 * q, vget_high_s32(sums[i][q]));
    }
}

#include "integer_product.inl"

uint64_t int8_loop(int rounds) {
  const int8x16_t codes = vdupq_n_s8(1);
  int32x4_t sums[12];
  for (int i = 0; i < 12; i++) sums[i] = vdupq_n_s32(i);
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < 12; i++) sums[i] = vmmlaq_s32(sums[i], codes, codes);
  int32x4_t all = sums[0];
  for (int i = 1; i < 12; i++) all = vorrq_s32(all, sums[i]);
  // The result is used, so that the loop stays.
  return (vmaxvq_s32(all) == 0) + static_cast<uint64_t>(rounds) * 12 * 32;
}

}  // namespace

extern const Kernels kNeonI8mm;
const Kernels kNeonI8mm = {"neon_i8mm", 8,      rms_norm,        quantize, integer_product, dense_product,
                           silu_gate,   rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

// NEON with dot products of four int8 in every lane.
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

template <int Bits, int Group>
inline void dot_panel(const uint8_t* codes, const int8_t* x, int32_t dots[][16]) {
  int32x4_t sums[4][4];
  for (int i = 0; i < 4; i++)
    for (int q = 0; q < 4; q++) sums[i][q] = vdupq_n_s32(0);
  for (int k = 0; k < Group; k += 4) {
    int8x16_t rows[4];
    for (int q = 0; q < 4; q++) rows[q] = vld1q_s8(x + k * 16 + 16 * q);
    for (int i = 0; i < 4; i++) {
      const int8x16_t four = four_codes(codes + i * Group + k);
      for (int q = 0; q < 4; q++) sums[i][q] = vdotq_s32(sums[i][q], four, rows[q]);
    }
  }
  for (int i = 0; i < 4; i++)
    for (int q = 0; q < 4; q++) vst1q_s32(dots[i] + 4 * q, sums[i][q]);
}

#include "integer_product.inl"

uint64_t int8_loop(int rounds) {
  const int8x16_t codes = vdupq_n_s8(1);
  int32x4_t sums[12];
  for (int i = 0; i < 12; i++) sums[i] = vdupq_n_s32(i);
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < 12; i++) sums[i] = vdotq_s32(sums[i], codes, codes);
  int32x4_t all = sums[0];
  for (int i = 1; i < 12; i++) all = vorrq_s32(all, sums[i]);
  // The result is used, so that the loop stays.
  return (vmaxvq_s32(all) == 0) + static_cast<uint64_t>(rounds) * 12 * 16;
}

}  // namespace

extern const Kernels kNeonDotprod;
const Kernels kNeonDotprod = {"neon_dotprod", 12,     rms_norm,        quantize, integer_product, dense_product,
                              silu_gate,      rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

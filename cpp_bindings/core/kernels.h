// The table of kernels, one for each instruction set that they are written for.
//
// All of them compute the same numbers, bit for bit, and those of a row do not depend on the rows beside it: integers
// are added exactly, floats in one order that every instruction set can follow (see kernels/lanes.h).
#pragma once

#include "attention.h"
#include "matrix.h"

namespace owl2 {

struct Kernels {
  const char* name;

  // Rows from which panels pay.
  int panel_rows;

  // y = x / sqrt(mean(x^2) + eps) * gain, over `width` values.
  void (*rms_norm)(const float* x, const float* gain, float eps, int width, float* y);

  // One row of activations, [inputs], to the codes, scales and sums of its groups. `code_step` is the distance in
  // bytes of four neighbouring codes (4 where they are contiguous), `scale_step` that of two groups' scales.
  void (*quantize)(const float* x, int inputs, int group, int bits, int8_t* codes, size_t code_step, float* scales,
                   int32_t* sums, size_t scale_step);

  // Outputs begin <= n < end of a product; `begin` is a multiple of 32.
  void (*integer_product)(const IntegerMatrix& weight, const Activations& x, int begin, int end, const Output& out);

  // The same with float weights and activations x[m * x_stride + k].
  void (*dense_product)(const DenseMatrix& weight, const float* x, size_t x_stride, int begin, int end,
                        const Output& out);

  // gate = silu(gate) * up, over `count` values.
  void (*silu_gate)(float* gate, const float* up, size_t count);

  // Rotates the pairs (i, i + half) of a head by angles given as cosines and sines [half], then multiplies by `scale`.
  void (*rotate)(float* head, const float* cosines, const float* sines, int half, float scale);

  // Stores a key and a value [D] as position `position` of a head's block.
  void (*store_key_value)(const HeadBlock& block, int position, const float* key, const float* value);

  // See attention.h.
  void (*attend)(const HeadQueries& queries, const HeadBlock* blocks);

  // Multiply-adds on registers alone, in a loop; return how many they did (see roof.h).
  uint64_t (*int8_loop)(int rounds);
  uint64_t (*fp32_loop)(int rounds);
};

}  // namespace owl2

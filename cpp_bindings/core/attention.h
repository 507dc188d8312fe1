// Keys and values of one attention head, and the queries that read them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace owl2 {

enum class KvType { f32, f16, i8 };

// Positions of a block of the K/V cache.
constexpr int kBlockPositions = 256;
// Keys that lie side by side: those of 16 positions for each value of the head.
constexpr int kKeyLanes = 16;

// Keys and values of kBlockPositions positions of one head of D values; Dp is D filled to a multiple of 16.
struct HeadBlock {
  KvType type = KvType::f32;
  int width = 0;                // D
  void* keys = nullptr;         // [kBlockPositions / 16, D, 16]
  void* values = nullptr;       // [kBlockPositions, Dp]
  float* key_scales = nullptr;  // [kBlockPositions], of int8 alone
  float* value_scales = nullptr;
};

constexpr int padded_width(int width) {
  return (width + 15) / 16 * 16;
}

// Rows of queries of one head in one sequence. Row t sees positions 0 .. past + t.
struct HeadQueries {
  int rows = 0;  // T
  int past = 0;
  const float* queries = nullptr;  // row t at t * query_stride, rotated and scaled: [D]
  size_t query_stride = 0;
  float* results = nullptr;  // row t at t * result_stride: [D]
  size_t result_stride = 0;
};

}  // namespace owl2

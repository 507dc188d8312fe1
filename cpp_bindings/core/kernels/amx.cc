// AMX: products of panels in tiles of int8; everything else as with AVX-512 VNNI.
//
// Weights are the rows of a tile (16 outputs by 64 columns), activations its columns (16 rows by 64 columns). The four
// tiles of 32 outputs and a group stay while all rows pass.
#include "../kernels.h"
#include "lanes_avx512.h"

namespace owl2 {
namespace {

#include "output.inl"
#include "rows.inl"
#include "attention.inl"
#include "dense.inl"
#include "roof.inl"
#include "by_shape.inl"
#include "integer_rows_avx512.inl"
#include "panels_avx512.inl"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1 are sums, 2 to 5 weights, 6 and 7 activations; `depth` columns of a group in each.
void configure_tiles(int depth) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? depth / 4 : 16);
    config.bytes[tile] = static_cast<uint16_t>(tile >= 2 && tile < 6 ? depth : 64);
  }
  // gcc 12's intrinsic says that it reads 8 of the 64 bytes, so that the others may not be written.
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

// Scales and zero points of a group of 32 outputs.
struct GroupScales {
  float scales[kPanelOutputs];
  int32_t zeros[kPanelOutputs];
};

// A group of 32 outputs: [part of 64 columns][32 outputs][64]. Four bits less their zero point fit int8; eight bits
// stay unsigned, and what the zero point takes off is subtracted from the dots.
template <int Bits, int Group>
inline void unpack_weights(const IntegerMatrix& w, int n, int width, int g, int8_t* codes, GroupScales* weights) {
  constexpr size_t kBytes = Group * Bits / 8;
  const size_t groups = w.groups(), row_bytes = groups * kBytes;
  const uint8_t* const bytes = w.codes + n * row_bytes + g * kBytes;
  const float* const scales = w.scales + n * groups + g;
  // Of the next outputs, a part at a time in the order of memory.
  const uint8_t* const next = w.codes + (n + kPanelOutputs) * row_bytes + g * kPanelOutputs * kBytes;
  for (int i = 0; i < kPanelOutputs; i++) {
    const int row = i < width ? i : 0;
    weights->scales[i] = scales[row * groups];
    weights->zeros[i] = w.zero_points == nullptr ? 1 << (Bits - 1) : w.zero_point(n + row, g);
  }
  for (int i = 0; i < kPanelOutputs; i++) {
    _mm_prefetch(reinterpret_cast<const char*>(next + i * kBytes), _MM_HINT_T1);
    const Unpacked part = unpack_group<Bits, Group>(bytes + (i < width ? i : 0) * row_bytes);
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(Bits == 4 ? weights->zeros[i] : 0));
    _mm512_store_si512(codes + i * 64, _mm512_sub_epi8(part.low, zero));
    if constexpr (Group == 128) _mm512_store_si512(codes + (kPanelOutputs + i) * 64, _mm512_sub_epi8(part.high, zero));
  }
}

template <int Bits, int Group>
inline void multiply_panel(const int8_t* x) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_loadd(6, x, 64);
  if constexpr (Group == 128) _tile_loadd(7, x + 1024, 64);
  if constexpr (Bits == 4) {
    _tile_dpbssd(0, 2, 6);
    _tile_dpbssd(1, 3, 6);
    if constexpr (Group == 128) {
      _tile_dpbssd(0, 4, 7);
      _tile_dpbssd(1, 5, 7);
    }
  } else {
    _tile_dpbusd(0, 2, 6);
    _tile_dpbusd(1, 3, 6);
    if constexpr (Group == 128) {
      _tile_dpbusd(0, 4, 7);
      _tile_dpbusd(1, 5, 7);
    }
  }
}

// sums[32][kPanelRows] += dots * weight scale * activation scale.
template <int Bits>
inline void add_scaled(const int32_t* dots, const GroupScales& weights, __m512 scales, const int32_t* row_sums,
                       float* sums) {
  for (int i = 0; i < kPanelOutputs; i++) {
    const __m512 both = _mm512_mul_ps(_mm512_set1_ps(weights.scales[i]), scales);
    __m512i whole = _mm512_load_si512(dots + i * 16);
    if constexpr (Bits == 8)
      whole = _mm512_sub_epi32(whole,
                               _mm512_mullo_epi32(_mm512_loadu_si512(row_sums), _mm512_set1_epi32(weights.zeros[i])));
    const __m512 dot = _mm512_cvtepi32_ps(whole);
    float* const sum = sums + i * kPanelRows;
    _mm512_store_ps(sum, _mm512_fmadd_ps(dot, both, _mm512_load_ps(sum)));
  }
}

// Dots that are on their way from the tiles to memory, and where they go. They are added one panel later: until then
// the tiles multiply on.
struct Pending {
  const int32_t* dots = nullptr;
  const GroupScales* weights = nullptr;
  size_t place = 0;
  float* sums = nullptr;

  template <int Bits>
  void add(const Activations& x) const {
    if (dots != nullptr)
      add_scaled<Bits>(dots, *weights, _mm512_loadu_ps(x.scales + place * 16), x.sums + place * 16, sums);
  }
};

template <int Group>
inline void load_weights(const int8_t* codes) {
  _tile_loadd(2, codes, 64);
  _tile_loadd(3, codes + 1024, 64);
  if constexpr (Group == 128) {
    _tile_loadd(4, codes + 2048, 64);
    _tile_loadd(5, codes + 3072, 64);
  }
}

template <int Bits, int Group>
void panels_block(const IntegerMatrix& w, const Activations& x, int n, int width, int first, int last, float* sums) {
  alignas(64) int8_t codes[2][2 * kPanelOutputs * 64];
  alignas(64) int32_t dots[2][kPanelOutputs * 16];
  GroupScales weights[3];  // of the pending group, this one and the next
  const int groups = w.groups();
  unpack_weights<Bits, Group>(w, n, width, 0, codes[0], &weights[0]);
  Pending pending;
  int turn = 0;
  for (int g = 0; g < groups; g++) {
    load_weights<Group>(codes[g & 1]);
    for (int p = first; p < last; p++, turn ^= 1) {
      const size_t place = static_cast<size_t>(p) * groups + g;
      multiply_panel<Bits, Group>(x.codes + place * Group * 16);
      if (p == first && g + 1 < groups)
        unpack_weights<Bits, Group>(w, n, width, g + 1, codes[(g + 1) & 1], &weights[(g + 1) % 3]);
      _tile_stored(0, dots[turn], 64);
      _tile_stored(1, dots[turn] + 256, 64);
      pending.add<Bits>(x);
      pending = {dots[turn], &weights[g % 3], place, sums + (p - first) * 16};
    }
  }
  pending.add<Bits>(x);
}

void integer_product(const IntegerMatrix& w, const Activations& x, int begin, int end, const Output& out) {
  if (!x.panels) return few_rows(w, x, begin, end, out);
  configure_tiles(w.group == 32 ? 32 : 64);
  by_shape(w, [&](auto bits, auto group) {
    each_block(begin, end, out, [&](int n, int width, int first, int last, float* sums) {
      panels_block<bits.value, group.value>(w, x, n, width, first, last, sums);
    });
  });
  _tile_release();
}

uint64_t int8_loop(int rounds) {
  configure_tiles(64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  const int some = rounds / 16;  // a tile does more than the registers of other instruction sets
  for (int round = 0; round < some; round++) {
    _tile_dpbssd(0, 2, 6);
    _tile_dpbssd(1, 3, 6);
    _tile_dpbssd(4, 2, 7);
    _tile_dpbssd(5, 3, 7);
  }
  _tile_release();
  return static_cast<uint64_t>(some) * 4 * 16 * 16 * 64;
}

}  // namespace

extern const Kernels kAmx;
const Kernels kAmx = {"amx",     5,      rms_norm,        quantize, integer_product, dense_product,
                      silu_gate, rotate, store_key_value, attend,   int8_loop,       fp32_loop};

}  // namespace owl2

// Codes in registers of NEON. Products are signed times signed, so that eight-bit codes are taken 128 lower.

using Bytes = int8x16_t;
using Sums = int32x4_t;
constexpr int kBytes = 16;
template <int Bits>
constexpr int kZero = Bits == 8 ? 128 : 0;

template <int Bits, int Group>
inline void unpack(const uint8_t* w, Bytes* codes) {
  if constexpr (Bits == 8) {
    for (int i = 0; i < Group / 16; i++)
      codes[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16 * i), vdupq_n_u8(0x80)));
  } else {
    for (int i = 0; i < Group / 32; i++) {
      const uint8x16_t bytes = vld1q_u8(w + 16 * i);
      codes[i] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
      codes[Group / 32 + i] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    }
  }
}

inline void whole_sums(const Sums* parts, int32_t* sums) {
  vst1q_s32(sums, vpaddq_s32(vpaddq_s32(parts[0], parts[1]), vpaddq_s32(parts[2], parts[3])));
}

// Four codes, in all lanes.
inline int8x16_t four_codes(const uint8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

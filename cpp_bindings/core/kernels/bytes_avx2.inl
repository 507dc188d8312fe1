// Codes in registers of AVX2, with or without VNNI.

using Bytes = __m256i;
using Sums = __m256i;
constexpr int kBytes = 32;
template <int Bits>
constexpr int kZero = 0;

inline __m256i load_bytes(const void* x) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(x));
}

template <int Bits, int Group>
inline void unpack(const uint8_t* w, Bytes* codes) {
  const __m256i mask = _mm256_set1_epi8(15);
  if constexpr (Bits == 8) {
    for (int i = 0; i < Group / 32; i++) codes[i] = load_bytes(w + 32 * i);
  } else if constexpr (Group == 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
    codes[0] = _mm256_and_si256(both, mask);
  } else {
    for (int i = 0; i < Group / 64; i++) {
      const __m256i bytes = load_bytes(w + 32 * i);
      codes[i] = _mm256_and_si256(bytes, mask);
      codes[Group / 64 + i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    }
  }
}

inline void whole_sums(const Sums* parts, int32_t* sums) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(parts[0], parts[1]), _mm256_hadd_epi32(parts[2], parts[3]));
  const __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), whole);
}

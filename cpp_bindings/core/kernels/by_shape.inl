// Bits and group size of a matrix as constants.

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with both.
template <class F>
inline void by_shape(const IntegerMatrix& w, const F& f) {
  if (w.bits == 4) {
    if (w.group == 128) return f(Constant<4>(), Constant<128>());
    if (w.group == 64) return f(Constant<4>(), Constant<64>());
    return f(Constant<4>(), Constant<32>());
  }
  if (w.group == 128) return f(Constant<8>(), Constant<128>());
  if (w.group == 64) return f(Constant<8>(), Constant<64>());
  return f(Constant<8>(), Constant<32>());
}

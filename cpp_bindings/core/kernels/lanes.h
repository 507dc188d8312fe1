// Sixteen floats, the unit in which every kernel adds: one register of AVX-512, two of AVX2, four of NEON, or an array.
//
// Each instruction set defines the same functions, of which each operation is one of IEEE 754 (fused multiply-add is
// one), so that kernels written with them give the same bits everywhere. Reductions add lane i to lane i + 8, then i +
// 4, i + 2, i + 1.
//
// This file is included once by each instruction set's source file, after the definition of Lanes, in that file's own
// namespace: inline functions of two of them must not be merged by the linker.

inline Lanes load_part(const float* x, int count) {
  if (count >= 16) return load(x);
  float part[16] = {};
  for (int i = 0; i < count; i++) part[i] = x[i];
  return load(part);
}

inline void store_part(float* y, Lanes x, int count) {
  if (count >= 16) return store(y, x);
  float part[16];
  store(part, x);
  for (int i = 0; i < count; i++) y[i] = part[i];
}

// exp(x), relative error below 2e-7; x is cut to -87 .. 88. After Cephes' expf.
inline Lanes exponential(Lanes x) {
  x = minimum(maximum(x, broadcast(-87.0f)), broadcast(88.0f));
  // The sum has no bits behind the point: it rounds to an integer n, which is in its low bits too.
  const Lanes shifted = fused(x, broadcast(1.44269504088896341f), broadcast(12582912.0f));
  const Lanes n = subtract(shifted, broadcast(12582912.0f));
  Lanes r = fused(n, broadcast(-0.693359375f), x);
  r = fused(n, broadcast(2.12194440e-4f), r);
  Lanes y = broadcast(1.9875691500e-4f);
  y = fused(y, r, broadcast(1.3981999507e-3f));
  y = fused(y, r, broadcast(8.3334519073e-3f));
  y = fused(y, r, broadcast(4.1665795894e-2f));
  y = fused(y, r, broadcast(1.6666665459e-1f));
  y = fused(y, r, broadcast(5.0000001201e-1f));
  y = add(fused(y, multiply(r, r), r), broadcast(1.0f));
  return times_power_of_two(y, shifted);
}

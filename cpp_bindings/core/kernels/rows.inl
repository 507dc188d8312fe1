// Kernels on single rows, for any Lanes. Included by each instruction set's source file, within its namespace.

void rms_norm(const float* x, const float* gain, float eps, int width, float* y) {
  Lanes squares = broadcast(0.0f);
  for (int i = 0; i < width; i += 16) {
    const Lanes part = load_part(x + i, width - i);
    squares = fused(part, part, squares);
  }
  const Lanes root = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps));
  for (int i = 0; i < width; i += 16) {
    const Lanes part = multiply(load_part(x + i, width - i), root);
    store_part(y + i, multiply(part, load_part(gain + i, width - i)), width - i);
  }
}

// Values as int8, the largest as 127 or -127; `count` is a multiple of 16. Returns the scale, and adds the codes to
// *sum.
inline float round_to_int8(const float* x, int count, int8_t* codes, int32_t* sum) {
  Lanes most = broadcast(0.0f);
  for (int i = 0; i < count; i += 16) most = largest_magnitude(most, load(x + i));
  const float magnitude = largest_bits(most);
  const Lanes inverse = broadcast(magnitude == 0.0f ? 0.0f : 127.0f / magnitude);
  for (int i = 0; i < count; i += 16) *sum += store_rounded(codes + i, multiply(load(x + i), inverse));
  return magnitude / 127.0f;
}

void quantize_group(const float* x, int count, int group, int bits, int8_t* codes, float* scale, int32_t* sum) {
  float values[128];
  if (count < group) {
    for (int i = 0; i < group; i++) values[i] = i < count ? x[i] : 0.0f;
    x = values;
  }
  int8_t plain[128];
  *sum = 0;
  *scale = round_to_int8(x, group, plain, sum);
  const int half = group / 2;
  if (bits == 4) {
    for (int i = 0; i < half; i++) {
      codes[i] = plain[2 * i];
      codes[half + i] = plain[2 * i + 1];
    }
  } else {
    __builtin_memcpy(codes, plain, static_cast<size_t>(group));
  }
}

void quantize(const float* x, int inputs, int group, int bits, int8_t* codes, size_t code_step, float* scales,
              int32_t* sums, size_t scale_step) {
  const int groups = (inputs + group - 1) / group;
  const size_t units = static_cast<size_t>(group) / 4;
  for (int g = 0; g < groups; g++) {
    const int left = inputs - g * group;
    int8_t unit[128];
    int8_t* const target = code_step == 4 ? codes + g * units * 4 : unit;
    quantize_group(x + static_cast<size_t>(g) * group, left < group ? left : group, group, bits, target,
                   scales + g * scale_step, sums + g * scale_step);
    if (code_step != 4)
      for (size_t i = 0; i < units; i++) __builtin_memcpy(codes + (g * units + i) * code_step, unit + 4 * i, 4);
  }
}

void silu_gate(float* gate, const float* up, size_t count) {
  for (size_t i = 0; i < count; i += 16) {
    const int left = count - i < 16 ? static_cast<int>(count - i) : 16;
    const Lanes x = load_part(gate + i, left);
    const Lanes negative = exponential(subtract(broadcast(0.0f), x));
    const Lanes silu = divide(x, add(broadcast(1.0f), negative));
    store_part(gate + i, multiply(silu, load_part(up + i, left)), left);
  }
}

void rotate(float* head, const float* cosines, const float* sines, int half, float scale) {
  for (int i = 0; i < half; i += 16) {
    const int left = half - i;
    const Lanes x = load_part(head + i, left), y = load_part(head + half + i, left);
    const Lanes c = load_part(cosines + i, left), s = load_part(sines + i, left);
    const Lanes first = subtract(multiply(x, c), multiply(y, s)), second = add(multiply(y, c), multiply(x, s));
    store_part(head + i, multiply(first, broadcast(scale)), left);
    store_part(head + half + i, multiply(second, broadcast(scale)), left);
  }
}

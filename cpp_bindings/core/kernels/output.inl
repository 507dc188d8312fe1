// How every product ends: the bias is added, then what was there before.

void write_lanes(const Output& out, int row, int n, int count, Lanes y) {
  float* const target = out.y + row * out.stride + (n - out.origin);
  if (out.bias != nullptr) y = add(y, load_part(out.bias + n, count));
  if (out.add) y = add(load_part(target, count), y);
  store_part(target, y, count);
}

void write_one(const Output& out, int row, int n, float y) {
  float* const target = out.y + row * out.stride + (n - out.origin);
  if (out.bias != nullptr) y += out.bias[n];
  *target = out.add ? *target + y : y;
}

// Multiply-adds on registers: `rounds` times kRoofSums of sixteen floats.
uint64_t fp32_loop(int rounds) {
  Lanes sums[kRoofSums];
  for (int i = 0; i < kRoofSums; i++) sums[i] = broadcast(static_cast<float>(i));
  const Lanes factor = broadcast(0.5f), term = broadcast(1.0f);
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < kRoofSums; i++) sums[i] = fused(sums[i], factor, term);
  float all[16], total = 0;
  for (int i = 0; i < kRoofSums; i++) {
    store(all, sums[i]);
    total += all[0];
  }
  // The result is used, so that the loop stays.
  return total < 0 ? 0 : static_cast<uint64_t>(rounds) * kRoofSums * 16;
}

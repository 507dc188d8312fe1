// Attention and the storing of keys and values: against the scalar kernels bit for bit, against a plain softmax within
// rounding, and each row alone against all rows at once, bit for bit.
#include <cmath>
#include <memory>

#include "check.h"

using namespace owl2;
using namespace owl2::test;

namespace {

struct Cache {
  Cache(KvType type, int width, int positions) {
    const size_t value = type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1;
    for (int start = 0; start < positions; start += kBlockPositions) {
      const size_t padded = static_cast<size_t>(padded_width(width));
      keys.push_back(std::vector<uint8_t>(kBlockPositions * width * value));
      values.push_back(std::vector<uint8_t>(kBlockPositions * padded * value));
      scales.push_back(std::vector<float>(2 * kBlockPositions));
      HeadBlock block{type, width, keys.back().data(), values.back().data(), nullptr, nullptr};
      if (type == KvType::i8) {
        block.key_scales = scales.back().data();
        block.value_scales = scales.back().data() + kBlockPositions;
      }
      blocks.push_back(block);
    }
  }
  std::vector<std::vector<uint8_t>> keys, values;
  std::vector<std::vector<float>> scales;
  std::vector<HeadBlock> blocks;
};

struct Problem {
  int width, past, rows;
  std::vector<float> keys, values, queries;
};

Cache stored(const Kernels& kernels, KvType type, const Problem& p) {
  Cache cache(type, p.width, p.past + p.rows);
  for (int i = 0; i < p.past + p.rows; i++)
    kernels.store_key_value(cache.blocks[i / kBlockPositions], i, p.keys.data() + i * p.width,
                            p.values.data() + i * p.width);
  return cache;
}

std::vector<float> attended(const Kernels& kernels, const Cache& cache, const Problem& p, int first, int rows) {
  std::vector<float> results(static_cast<size_t>(rows) * p.width);
  HeadQueries q;
  q.rows = rows;
  q.past = p.past + first;
  q.queries = p.queries.data() + static_cast<size_t>(first) * p.width;
  q.query_stride = q.result_stride = static_cast<size_t>(p.width);
  q.results = results.data();
  kernels.attend(q, cache.blocks.data());
  return results;
}

std::vector<double> softmax_attention(const Problem& p) {
  std::vector<double> results(static_cast<size_t>(p.rows) * p.width);
  for (int row = 0; row < p.rows; row++) {
    std::vector<double> weights(p.past + row + 1);
    double most = -1e300, total = 0;
    for (size_t j = 0; j < weights.size(); j++) {
      weights[j] = 0;
      for (int d = 0; d < p.width; d++)
        weights[j] += static_cast<double>(p.queries[row * p.width + d]) * p.keys[j * p.width + d];
      most = std::max(most, weights[j]);
    }
    for (double& weight : weights) total += weight = std::exp(weight - most);
    for (size_t j = 0; j < weights.size(); j++)
      for (int d = 0; d < p.width; d++) results[row * p.width + d] += weights[j] / total * p.values[j * p.width + d];
  }
  return results;
}

void compare(const Kernels& one, const Kernels& scalar, KvType type, const Problem& p) {
  const int name = static_cast<int>(type);
  const Cache cache = stored(one, type, p), expected = stored(scalar, type, p);
  bool same_cache = true;
  for (size_t i = 0; i < cache.blocks.size(); i++)
    same_cache = same_cache && same(cache.keys[i], expected.keys[i]) && same(cache.values[i], expected.values[i]) &&
                 same(cache.scales[i], expected.scales[i]);
  check(same_cache, "store_key_value", one.name, name, p.width, p.past);
  const std::vector<float> all = attended(one, cache, p, 0, p.rows);
  check(same(all, attended(scalar, expected, p, 0, p.rows)), "attend", one.name, name, p.width, p.past);
  for (int row = 0; row < p.rows; row++) {
    const std::vector<float> alone = attended(one, cache, p, row, 1);
    check(std::memcmp(alone.data(), all.data() + row * p.width, p.width * sizeof(float)) == 0, "a row alone", one.name,
          name, p.width, row);
  }
  const double tolerance = type == KvType::f32 ? 2e-6 : type == KvType::f16 ? 2e-3 : 3e-2;
  const std::vector<double> exact = softmax_attention(p);
  for (size_t i = 0; i < all.size(); i++)
    check(std::fabs(all[i] - exact[i]) < tolerance, "softmax", one.name, name, p.width, static_cast<int>(i));
}

}  // namespace

int main() {
  std::mt19937 random(3);
  const std::vector<const Kernels*> all = available_kernels();
  for (const Kernels* one : all)
    for (const KvType type : {KvType::f32, KvType::f16, KvType::i8})
      for (const int width : {6, 16, 20, 64, 128})
        for (const int past : {0, 1, 63, 64, 250, 300})
          for (const int rows : {1, 2, 7, 40}) {
            const size_t positions = static_cast<size_t>(past + rows);
            compare(*one, *all.back(), type,
                    {width, past, rows, numbers(positions * width, &random), numbers(positions * width, &random),
                     numbers(static_cast<size_t>(rows) * width, &random, 4.0f / std::sqrt(static_cast<float>(width)))});
          }
  return result("attention_test");
}

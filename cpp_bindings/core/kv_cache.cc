#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace owl2 {
namespace {

size_t value_bytes(KvType type) {
  return type == KvType::f32 ? 4 : type == KvType::f16 ? 2 : 1;
}

size_t key_bytes(const KvShape& shape) {
  const size_t bytes = static_cast<size_t>(kBlockPositions) * shape.width * value_bytes(shape.type);
  return (bytes + 63) / 64 * 64;
}

size_t row_bytes(const KvShape& shape) {
  return static_cast<size_t>(kBlockPositions) * padded_width(shape.width) * value_bytes(shape.type);
}

int block_count(int positions) {
  return (positions + kBlockPositions - 1) / kBlockPositions;
}

// The first positions of a block of one head, from it or into it.
template <class Value, bool Reading>
void copy_positions(const HeadBlock& block, int count, Value* keys, Value* values) {
  const int width = block.width, padded = padded_width(width);
  auto* const block_keys = static_cast<Value*>(block.keys);
  auto* const block_values = static_cast<Value*>(block.values);
  for (int p = 0; p < count; p++) {
    Value* const lanes = block_keys + static_cast<size_t>(p / kKeyLanes) * width * kKeyLanes + p % kKeyLanes;
    Value* const key = keys + static_cast<size_t>(p) * width;
    Value* const value = values + static_cast<size_t>(p) * width;
    if constexpr (Reading) {
      for (int d = 0; d < width; d++) key[d] = lanes[static_cast<size_t>(d) * kKeyLanes];
      std::memcpy(value, block_values + static_cast<size_t>(p) * padded, width * sizeof(Value));
    } else {
      for (int d = 0; d < width; d++) lanes[static_cast<size_t>(d) * kKeyLanes] = key[d];
      std::memcpy(block_values + static_cast<size_t>(p) * padded, value, width * sizeof(Value));
    }
  }
}

template <bool Reading>
void copy_scales(float* block, float* outside, int count) {
  std::memcpy(Reading ? outside : block, Reading ? block : outside, count * sizeof(float));
}

}  // namespace

KvCache::KvCache(const KvShape& shape, int capacity)
    : shape_(shape), capacity_(capacity), layers_(shape.layers, std::vector<Block>(block_count(capacity))) {}

KvCache KvCache::resized(int capacity) const {
  KvCache copy(*this);
  copy.capacity_ = capacity;
  for (std::vector<Block>& blocks : copy.layers_) blocks.resize(block_count(capacity));
  return copy;
}

size_t KvCache::head_bytes() const {
  const size_t scales = shape_.type == KvType::i8 ? 2 * kBlockPositions * sizeof(float) : 0;
  return key_bytes(shape_) + row_bytes(shape_) + scales;
}

size_t KvCache::bytes() const {
  return static_cast<size_t>(block_count(capacity_)) * shape_.layers * shape_.heads * head_bytes();
}

void KvCache::prepare(int first, int last) {
  for (std::vector<Block>& blocks : layers_) {
    for (int b = first / kBlockPositions; b * kBlockPositions < last; b++) {
      if (blocks[b] != nullptr && blocks[b].use_count() == 1) continue;
      auto own = std::make_shared<Memory>(shape_.heads * head_bytes());
      if (blocks[b] != nullptr) std::memcpy(own->as<char>(), blocks[b]->as<char>(), own->bytes());
      blocks[b] = std::move(own);
    }
  }
}

HeadBlock KvCache::head_block(const Memory& memory, int head) const {
  char* const start = memory.as<char>() + head * head_bytes();
  HeadBlock block;
  block.type = shape_.type;
  block.width = shape_.width;
  block.keys = start;
  block.values = start + key_bytes(shape_);
  if (shape_.type == KvType::i8) {
    block.key_scales = reinterpret_cast<float*>(start + key_bytes(shape_) + row_bytes(shape_));
    block.value_scales = block.key_scales + kBlockPositions;
  }
  return block;
}

template <bool Reading>
void KvCache::copy(int positions, char* keys, char* values, float* key_scales, float* value_scales) const {
  const size_t bytes = value_bytes(shape_.type);
  for (int layer = 0; layer < shape_.layers; layer++) {
    for (int head = 0; head < shape_.heads; head++) {
      for (int first = 0; first < positions; first += kBlockPositions) {
        const int count = std::min(kBlockPositions, positions - first);
        const HeadBlock block = head_block(*layers_[layer][first / kBlockPositions], head);
        const size_t place = (static_cast<size_t>(layer) * shape_.heads + head) * positions + first;
        const size_t at = place * shape_.width * bytes;
        switch (bytes) {
          case 4:
            copy_positions<uint32_t, Reading>(block, count, reinterpret_cast<uint32_t*>(keys + at),
                                              reinterpret_cast<uint32_t*>(values + at));
            break;
          case 2:
            copy_positions<uint16_t, Reading>(block, count, reinterpret_cast<uint16_t*>(keys + at),
                                              reinterpret_cast<uint16_t*>(values + at));
            break;
          default:
            copy_positions<uint8_t, Reading>(block, count, reinterpret_cast<uint8_t*>(keys + at),
                                             reinterpret_cast<uint8_t*>(values + at));
        }
        if (shape_.type != KvType::i8) continue;
        copy_scales<Reading>(block.key_scales, key_scales + place, count);
        copy_scales<Reading>(block.value_scales, value_scales + place, count);
      }
    }
  }
}

void KvCache::read(int positions, void* keys, void* values, float* key_scales, float* value_scales) const {
  for (const std::vector<Block>& blocks : layers_)
    for (int b = 0; b < block_count(positions); b++)
      if (blocks[b] == nullptr) throw std::invalid_argument("positions of a K/V cache that were never written");
  copy<true>(positions, static_cast<char*>(keys), static_cast<char*>(values), key_scales, value_scales);
}

void KvCache::write(int positions, const void* keys, const void* values, const float* key_scales,
                    const float* value_scales) {
  prepare(0, positions);
  // The direction is in the template: nothing is written to what is given.
  copy<false>(positions, static_cast<char*>(const_cast<void*>(keys)), static_cast<char*>(const_cast<void*>(values)),
              const_cast<float*>(key_scales), const_cast<float*>(value_scales));
}

void KvCache::head_blocks(int layer, int head, int last, std::vector<HeadBlock>* blocks) const {
  blocks->clear();
  for (int b = 0; b * kBlockPositions < last; b++) blocks->push_back(head_block(*layers_[layer][b], head));
}

}  // namespace owl2

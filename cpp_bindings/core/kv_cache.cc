#include "kv_cache.h"

#include <cstring>

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

void KvCache::head_blocks(int layer, int head, int last, std::vector<HeadBlock>* blocks) const {
  blocks->clear();
  for (int b = 0; b * kBlockPositions < last; b++) blocks->push_back(head_block(*layers_[layer][b], head));
}

}  // namespace owl2

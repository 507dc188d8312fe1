// The keys and values of one sequence, in blocks of positions.
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "memory.h"

namespace owl2 {

struct KvShape {
  int layers = 0;
  int heads = 0;
  int width = 0;  // of a head
  KvType type = KvType::f16;
};

// Copies share their blocks until one of them writes. Memory is taken when it is first written to.
class KvCache {
 public:
  KvCache(const KvShape& shape, int capacity);

  // The first positions of this cache, with room for `capacity`.
  KvCache resized(int capacity) const;

  const KvShape& shape() const { return shape_; }
  int capacity() const { return capacity_; }
  // Of all positions that it has room for.
  size_t bytes() const;

  // Makes the blocks of positions first <= p < last this cache's own. Throws std::bad_alloc.
  void prepare(int first, int last);

  // Copies the keys and values of the first positions, each [layers][heads][positions][width], and with int8 their
  // scales [layers][heads][positions]. Throws std::invalid_argument for positions that were never written.
  void read(int positions, void* keys, void* values, float* key_scales, float* value_scales) const;
  // The inverse: makes them the first positions. Throws std::bad_alloc.
  void write(int positions, const void* keys, const void* values, const float* key_scales, const float* value_scales);

  // Head blocks of one layer and head, in the order of positions: for `attend`.
  void head_blocks(int layer, int head, int last, std::vector<HeadBlock>* blocks) const;

 private:
  using Block = std::shared_ptr<Memory>;

  template <bool Reading>
  void copy(int positions, char* keys, char* values, float* key_scales, float* value_scales) const;
  size_t head_bytes() const;
  HeadBlock head_block(const Memory& memory, int head) const;

  KvShape shape_;
  int capacity_;
  std::vector<std::vector<Block>> layers_;  // [layers][blocks]; null until they are written to
};

}  // namespace owl2

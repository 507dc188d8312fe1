// The decoder: a step takes rows of embeddings through all layers and gives logits.
//
// Shapes: M rows of a step (of all sequences), C hidden width, F inner width of the MLP, H heads of D values, V
// vocabulary.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "kv_cache.h"
#include "memory.h"
#include "pool.h"
#include "products.h"

namespace owl2 {

struct DecoderShape {
  int width = 0;  // C
  int inner = 0;  // F
  int heads = 0;  // H
  int vocabulary = 0;
  float epsilon = 0;  // of the norms

  int head_width() const { return width / heads; }
};

// Weights of a layer; of two, the first is that of text rows, the second that of image rows.
struct DecoderLayer {
  const float* input_gains[2] = {};  // [C]
  const float* post_gains[2] = {};
  Linear q, k[2], v[2], o, gate, up, down;
};

struct DecoderWeights {
  std::vector<DecoderLayer> layers;
  const float* norm = nullptr;  // [C]
  Linear head;
};

// New rows of one sequence, at positions past .. past + rows - 1. Its cache must have room for them.
struct SequenceRows {
  KvCache* cache = nullptr;
  int past = 0;
  int rows = 0;
};

struct Step {
  std::vector<SequenceRows> sequences;  // their rows one after the other: M in all
  const float* embeddings = nullptr;    // [M, C]
  const uint8_t* modality = nullptr;    // [M]: 0 text, 1 image
  const float* cosines = nullptr;       // [M, D / 2], rotary angles of each row
  const float* sines = nullptr;
  std::vector<int> logit_rows;
  float* logits = nullptr;        // [logit_rows, V]
  std::function<bool()> stopped;  // asked by the calling thread, many times a second
};

// Several threads may call; one step runs at a time.
class Decoder {
 public:
  // The weights must outlive the decoder.
  Decoder(const DecoderShape& shape, DecoderWeights weights, const Kernels& kernels, Pool* pool);

  ~Decoder();

  // Returns false if it was stopped. Positions before `past` are never written to.
  // Throws std::bad_alloc, before anything is written.
  bool run(const Step& step);

  int layers() const { return static_cast<int>(weights_.layers.size()); }

 private:
  struct Buffers;
  class Run;

  DecoderShape shape_;
  DecoderWeights weights_;
  const Kernels& kernels_;
  Pool* pool_;
  std::mutex mutex_;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace owl2

#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace owl2 {

// Rows of a step; text rows come first, whatever sequence they are of, then image rows.
struct Decoder::Buffers {
  Buffers(const Kernels& kernels, Pool* pool) : inputs(kernels, pool) {}

  Scratch<float> residual;                     // [M, C]
  Scratch<float> normed;                       // [M, C]
  Scratch<float> q, k, v;                      // [M, C]
  Scratch<float> attended;                     // [M, C]
  Scratch<float> gate;                         // [M, F]
  Scratch<float> up;                           // [threads, M, chunk]
  std::vector<std::vector<HeadBlock>> blocks;  // of each thread
  Inputs inputs;
};

// One step.
class Decoder::Run {
 public:
  Run(Decoder* decoder, const Step& step)
      : shape_(decoder->shape_),
        weights_(decoder->weights_),
        kernels_(decoder->kernels_),
        pool_(decoder->pool_),
        step_(step),
        buffers_(*decoder->buffers_),
        inputs_(buffers_.inputs) {
    place_rows();
    const size_t hidden = static_cast<size_t>(rows_) * shape_.width;
    residual_ = buffers_.residual.of(hidden);
    normed_ = buffers_.normed.of(hidden);
    q_ = buffers_.q.of(hidden);
    k_ = buffers_.k.of(hidden);
    v_ = buffers_.v.of(hidden);
    attended_ = buffers_.attended.of(hidden);
    gate_ = buffers_.gate.of(static_cast<size_t>(rows_) * shape_.inner);
    buffers_.up.of(static_cast<size_t>(pool_->threads()) * rows_ * chunk_outputs(rows_));
    buffers_.blocks.resize(pool_->threads());
    for (const SequenceRows& sequence : step.sequences)
      sequence.cache->prepare(sequence.past, sequence.past + sequence.rows);
    for (int row = 0; row < rows_; row++)
      std::memcpy(residual_ + width() * place_[row], step.embeddings + width() * row, width() * sizeof(float));
  }

  bool run() {
    for (int layer = 0; layer < static_cast<int>(weights_.layers.size()); layer++) {
      if (!attention(layer) || !mlp(weights_.layers[layer])) return false;
    }
    return logits();
  }

 private:
  size_t width() const { return static_cast<size_t>(shape_.width); }

  void place_rows() {
    for (const SequenceRows& sequence : step_.sequences) rows_ += sequence.rows;
    place_.resize(rows_);
    for (int row = 0; row < rows_; row++) text_ += step_.modality[row] == 0;
    int text = 0, image = text_;
    for (int row = 0; row < rows_; row++) place_[row] = step_.modality[row] == 0 ? text++ : image++;
  }

  bool stopped() const { return step_.stopped && step_.stopped(); }

  Output all(float* y, size_t stride) const {
    Output out;
    out.y = y;
    out.stride = stride;
    out.last = rows_;
    return out;
  }

  Output routed(float* y, int modality) const {
    Output out = all(y, width());
    (modality == 0 ? out.last : out.first) = text_;
    return out;
  }

  void norm(const float* const gains[2]) {
    pool_->run(rows_, [&](int row, int) {
      kernels_.rms_norm(residual_ + row * width(), gains[row < text_ ? 0 : 1], shape_.epsilon, shape_.width,
                        normed_ + row * width());
    });
    inputs_.set(normed_, width(), rows_);
  }

  void add_to_residual(const float* x, size_t stride, const Linear& linear) {
    inputs_.set(x, stride, rows_);
    Output out = all(residual_, width());
    out.add = true;
    multiply_all(&inputs_, pool_, rows_, {{&linear, out}});
  }

  bool attention(int index) {
    if (stopped()) return false;
    const DecoderLayer& layer = weights_.layers[index];
    norm(layer.input_gains);
    multiply_all(&inputs_, pool_, rows_,
                 {{&layer.q, all(q_, width())},
                  {&layer.k[0], routed(k_, 0)},
                  {&layer.v[0], routed(v_, 0)},
                  {&layer.k[1], routed(k_, 1)},
                  {&layer.v[1], routed(v_, 1)}});
    if (stopped()) return false;
    const int heads = shape_.heads;
    pool_->run(static_cast<int>(step_.sequences.size()) * heads,
               [&](int task, int thread) { attend(index, task / heads, task % heads, &buffers_.blocks[thread]); });
    if (stopped()) return false;
    add_to_residual(attended_, width(), layer.o);
    return true;
  }

  // One head of one sequence: rotates, stores the new keys and values, then reads them all.
  void attend(int layer, int which, int head, std::vector<HeadBlock>* blocks) {
    const SequenceRows& sequence = step_.sequences[which];
    int first = 0;
    for (int i = 0; i < which; i++) first += step_.sequences[i].rows;
    const int half = shape_.head_width() / 2;
    const size_t offset = static_cast<size_t>(head) * shape_.head_width();
    const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_width()));
    sequence.cache->head_blocks(layer, head, sequence.past + sequence.rows, blocks);
    for (int t = 0; t < sequence.rows; t++) {
      const size_t at = width() * place_[first + t] + offset, angle = static_cast<size_t>(first + t) * half;
      kernels_.rotate(q_ + at, step_.cosines + angle, step_.sines + angle, half, scale);
      kernels_.rotate(k_ + at, step_.cosines + angle, step_.sines + angle, half, 1.0f);
      const int position = sequence.past + t;
      kernels_.store_key_value((*blocks)[position / kBlockPositions], position, k_ + at, v_ + at);
    }
    // Rows of one modality that follow each other in the sequence do so in the buffers too.
    for (int t = 0; t < sequence.rows;) {
      int end = t + 1;
      while (end < sequence.rows && place_[first + end] == place_[first + end - 1] + 1) end++;
      const size_t at = width() * place_[first + t] + offset;
      HeadQueries queries;
      queries.rows = end - t;
      queries.past = sequence.past + t;
      queries.queries = q_ + at;
      queries.query_stride = width();
      queries.results = attended_ + at;
      queries.result_stride = width();
      kernels_.attend(queries, blocks->data());
      t = end;
    }
  }

  bool mlp(const DecoderLayer& layer) {
    if (stopped()) return false;
    norm(layer.post_gains);
    inputs_.prepare(layer.gate);
    inputs_.prepare(layer.up);
    const int chunk = chunk_outputs(rows_), inner = shape_.inner;
    pool_->run((inner + chunk - 1) / chunk, [&](int index, int thread) {
      const int begin = index * chunk, end = std::min(begin + chunk, inner), count = end - begin;
      float* const up = buffers_.up.get() + static_cast<size_t>(thread) * rows_ * chunk;
      Output out = all(up, static_cast<size_t>(count));
      out.origin = begin;
      inputs_.multiply(layer.up, begin, end, out);
      inputs_.multiply(layer.gate, begin, end, all(gate_, static_cast<size_t>(inner)));
      for (int row = 0; row < rows_; row++)
        kernels_.silu_gate(gate_ + static_cast<size_t>(row) * inner + begin, up + static_cast<size_t>(row) * count,
                           count);
    });
    if (stopped()) return false;
    add_to_residual(gate_, static_cast<size_t>(inner), layer.down);
    return true;
  }

  bool logits() {
    if (stopped()) return false;
    const int count = static_cast<int>(step_.logit_rows.size());
    for (int i = 0; i < count; i++) {
      const float* const row = residual_ + width() * place_[step_.logit_rows[i]];
      kernels_.rms_norm(row, weights_.norm, shape_.epsilon, shape_.width, normed_ + width() * i);
    }
    inputs_.set(normed_, width(), count);
    Output out;
    out.y = step_.logits;
    out.stride = static_cast<size_t>(shape_.vocabulary);
    out.last = count;
    multiply_all(&inputs_, pool_, count, {{&weights_.head, out}});
    return true;
  }

  const DecoderShape& shape_;
  const DecoderWeights& weights_;
  const Kernels& kernels_;
  Pool* pool_;
  const Step& step_;
  Buffers& buffers_;
  Inputs& inputs_;
  std::vector<int> place_;  // where a row of the step is in the buffers
  int rows_ = 0;
  int text_ = 0;
  float *residual_, *normed_, *q_, *k_, *v_, *attended_, *gate_;
};

Decoder::Decoder(const DecoderShape& shape, DecoderWeights weights, const Kernels& kernels, Pool* pool)
    : shape_(shape),
      weights_(std::move(weights)),
      kernels_(kernels),
      pool_(pool),
      buffers_(std::make_unique<Buffers>(kernels, pool)) {}

Decoder::~Decoder() = default;

bool Decoder::run(const Step& step) {
  std::lock_guard<std::mutex> lock(mutex_);
  return Run(this, step).run();
}

}  // namespace owl2

// Linear layers, and how the threads of a pool share their products.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "memory.h"
#include "pool.h"

namespace owl2 {

struct Linear {
  bool dense = false;
  IntegerMatrix integers;
  DenseMatrix floats;
  const float* bias = nullptr;       // [N]
  const int64_t* columns = nullptr;  // [K], the input that each column of the matrix multiplies; null: in order

  int outputs() const { return dense ? floats.outputs : integers.outputs; }
  int inputs() const { return dense ? floats.inputs : integers.inputs; }
};

// Rows x[m * stride + k] in the forms in which the products of a phase want them.
class Inputs {
 public:
  Inputs(const Kernels& kernels, Pool* pool) : kernels_(kernels), pool_(pool) {}

  // New rows: forgets the forms of the former ones.
  void set(const float* x, size_t stride, int rows);

  // Makes the form that a layer takes, unless it is there.
  void prepare(const Linear& linear);

  // Outputs begin <= n < end; the form has been made.
  void multiply(const Linear& linear, int begin, int end, Output out) const;

 private:
  struct Form {
    bool used = false;
    bool dense = false;
    int bits = 0, group = 0;
    const int64_t* columns = nullptr;
    Activations activations;
    Scratch<int8_t> codes;
    Scratch<float> scales, ordered;
    Scratch<int32_t> sums;

    bool fits(const Linear& linear) const;
  };

  void order(const Linear& linear, Form* form);
  void quantize(const Linear& linear, Form* form);

  const Kernels& kernels_;
  Pool* pool_;
  const float* x_ = nullptr;
  size_t stride_ = 0;
  int rows_ = 0;
  std::vector<std::unique_ptr<Form>> forms_;
};

// Outputs that a thread takes at a time.
int chunk_outputs(int rows);

// Products of the same rows.
struct Product {
  const Linear* linear;
  Output out;
};
void multiply_all(Inputs* inputs, Pool* pool, int rows, const std::vector<Product>& products);

}  // namespace owl2

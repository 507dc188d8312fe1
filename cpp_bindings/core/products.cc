#include "products.h"

#include <algorithm>

namespace owl2 {

bool Inputs::Form::fits(const Linear& linear) const {
  if (!used || dense != linear.dense || columns != linear.columns) return false;
  return dense || (bits == linear.integers.bits && group == linear.integers.group);
}

void Inputs::set(const float* x, size_t stride, int rows) {
  x_ = x;
  stride_ = stride;
  rows_ = rows;
  for (const std::unique_ptr<Form>& form : forms_) form->used = false;
}

void Inputs::prepare(const Linear& linear) {
  const auto is_made = [&](const std::unique_ptr<Form>& form) { return form->fits(linear); };
  if (std::any_of(forms_.begin(), forms_.end(), is_made)) return;
  auto unused = std::find_if(forms_.begin(), forms_.end(), [](const auto& form) { return !form->used; });
  if (unused == forms_.end()) {
    forms_.push_back(std::make_unique<Form>());
    unused = forms_.end() - 1;
  }
  Form* const form = unused->get();
  form->used = true;
  form->dense = linear.dense;
  form->columns = linear.columns;
  if (linear.columns != nullptr) order(linear, form);
  if (!linear.dense) quantize(linear, form);
}

// Rows with their values in the order of the matrix's columns.
void Inputs::order(const Linear& linear, Form* form) {
  const size_t width = static_cast<size_t>(linear.inputs());
  float* const ordered = form->ordered.of(rows_ * width);
  pool_->run(rows_, [&](int row, int) {
    for (size_t k = 0; k < width; k++) ordered[row * width + k] = x_[row * stride_ + linear.columns[k]];
  });
}

void Inputs::quantize(const Linear& linear, Form* form) {
  const IntegerMatrix& w = linear.integers;
  const bool panels = rows_ >= kernels_.panel_rows;
  const int groups = w.groups();
  const size_t lane_rows =
      (static_cast<size_t>(rows_) + Activations::kPanel - 1) / Activations::kPanel * Activations::kPanel;
  const size_t stored = panels ? lane_rows : static_cast<size_t>(rows_);
  form->bits = w.bits;
  form->group = w.group;
  int8_t* const codes = form->codes.of(stored * groups * w.group);
  float* const scales = form->scales.of(stored * groups);
  int32_t* const sums = form->sums.of(stored * groups);
  form->activations = {rows_, groups, w.group, panels, codes, scales, sums};
  const float* const x = linear.columns != nullptr ? form->ordered.get() : x_;
  const size_t stride = linear.columns != nullptr ? static_cast<size_t>(w.inputs) : stride_;
  pool_->run(rows_, [&](int row, int) {
    const float* const values = x + row * stride;
    const size_t first = static_cast<size_t>(panels ? row / 16 * 16 : row) * groups;
    const size_t lane = panels ? row % 16 : 0;
    kernels_.quantize(values, w.inputs, w.group, w.bits, codes + first * w.group + 4 * lane, panels ? 64 : 4,
                      scales + first + lane, sums + first + lane, panels ? 16 : 1);
  });
}

void Inputs::multiply(const Linear& linear, int begin, int end, Output out) const {
  const auto form = std::find_if(forms_.begin(), forms_.end(), [&](const auto& one) { return one->fits(linear); });
  out.bias = linear.bias;
  if (!linear.dense) return kernels_.integer_product(linear.integers, (*form)->activations, begin, end, out);
  const bool ordered = linear.columns != nullptr;
  kernels_.dense_product(linear.floats, ordered ? (*form)->ordered.get() : x_,
                         ordered ? static_cast<size_t>(linear.inputs()) : stride_, begin, end, out);
}

int chunk_outputs(int rows) {
  return rows > 4 && rows <= 16 ? 96 : 128;
}

void multiply_all(Inputs* inputs, Pool* pool, int rows, const std::vector<Product>& products) {
  const int chunk = chunk_outputs(rows);
  std::vector<int> ends;  // chunks up to the end of each product
  int chunks = 0;
  for (const Product& product : products) {
    if (product.out.last > product.out.first) {
      inputs->prepare(*product.linear);
      chunks += (product.linear->outputs() + chunk - 1) / chunk;
    }
    ends.push_back(chunks);
  }
  pool->run(chunks, [&](int index, int) {
    const size_t which = std::upper_bound(ends.begin(), ends.end(), index) - ends.begin();
    const int begin = (index - (which == 0 ? 0 : ends[which - 1])) * chunk;
    const Product& product = products[which];
    inputs->multiply(*product.linear, begin, std::min(begin + chunk, product.linear->outputs()), product.out);
  });
}

}  // namespace owl2

#include <nanobind/stl/optional.h>

#include <optional>

#include "binding.h"

namespace owl2 {
namespace {

// Checked once, so that a step need not.
const int64_t* column_order(const View& columns, int inputs) {
  const int64_t* const order = columns.as<int64_t>(static_cast<size_t>(inputs), "columns");
  for (int k = 0; k < inputs; k++)
    if (order[k] < 0 || order[k] >= inputs)
      throw std::invalid_argument("columns has the index " + std::to_string(order[k]));
  return order;
}

using MaybeView = std::optional<View>;

Linear integer_linear(int outputs, int inputs, int bits, int group, const View& codes, const View& scales,
                      const MaybeView& zero_points, const MaybeView& bias, const MaybeView& columns) {
  if (outputs <= 0 || inputs <= 0 || (bits != 4 && bits != 8) || (group != 32 && group != 64 && group != 128))
    throw std::invalid_argument("an integer matrix of " + std::to_string(outputs) + " x " + std::to_string(inputs) +
                                ", " + std::to_string(bits) + " bits, groups of " + std::to_string(group));
  Linear linear;
  IntegerMatrix& matrix = linear.integers;
  matrix.outputs = outputs;
  matrix.inputs = inputs;
  matrix.bits = bits;
  matrix.group = group;
  const size_t rows = static_cast<size_t>(outputs);
  matrix.codes = codes.as<uint8_t>(rows * matrix.row_bytes(), "codes");
  matrix.scales = scales.as<float>(rows * matrix.groups(), "scales");
  const size_t zero_bytes = (static_cast<size_t>(matrix.groups()) * bits + 7) / 8;
  if (zero_points) matrix.zero_points = zero_points->as<uint8_t>(rows * zero_bytes, "zero points");
  if (bias) linear.bias = bias->as<float>(rows, "bias");
  if (columns) linear.columns = column_order(*columns, inputs);
  return linear;
}

Linear dense_linear(int outputs, int inputs, bool half, const View& values, const MaybeView& bias,
                    const MaybeView& columns) {
  if (outputs <= 0 || inputs <= 0) throw std::invalid_argument("a matrix without rows or columns");
  Linear linear;
  linear.dense = true;
  DenseMatrix& matrix = linear.floats;
  matrix.outputs = outputs;
  matrix.inputs = inputs;
  const size_t count = static_cast<size_t>(outputs) * inputs;
  matrix.type = half ? FloatType::f16 : FloatType::f32;
  if (half)
    matrix.values = values.as<uint16_t>(count, "values");
  else
    matrix.values = values.as<float>(count, "values");
  if (bias) linear.bias = bias->as<float>(outputs, "bias");
  if (columns) linear.columns = column_order(*columns, inputs);
  return linear;
}

}  // namespace

void bind_weights(nb::module_& m) {
  nb::class_<MappedFile>(m, "MappedFile", "A file in memory, read only.")
      .def(nb::init<int, size_t>(), nb::arg("descriptor"), nb::arg("size"),
           "Map an open file, which may be closed then.")
      .def_prop_ro("damaged", &MappedFile::damaged, "Whether the file was truncated since, and a read met the hole.");

  nb::class_<View>(m, "View", "Bytes that weights are read from.")
      .def(
          "__init__",
          [](View* self, nb::object file, size_t offset, size_t size) {
            const MappedFile& mapped = nb::cast<const MappedFile&>(file);
            if (offset > mapped.size() || size > mapped.size() - offset)
              throw std::invalid_argument("bytes beyond the end of the file");
            new (self) View{file, mapped.data() + offset, size};
          },
          nb::arg("file"), nb::arg("offset"), nb::arg("size"), "Bytes of a mapped file.")
      .def_static(
          "of",
          [](nb::bytes content) {
            return View{content, reinterpret_cast<const uint8_t*>(content.c_str()), content.size()};
          },
          nb::arg("content"), "The bytes of an object.");

  nb::class_<Linear>(m, "Linear", "A linear layer: views of its weights, which must outlive it.")
      .def_static("integers", &integer_linear, nb::arg("outputs"), nb::arg("inputs"), nb::arg("bits"), nb::arg("group"),
                  nb::arg("codes"), nb::arg("scales"), nb::arg("zero_points").none(), nb::arg("bias").none(),
                  nb::arg("columns").none(), "Integers in the layout of MatMulNBits, scales float32.")
      .def_static("floats", &dense_linear, nb::arg("outputs"), nb::arg("inputs"), nb::arg("half"), nb::arg("values"),
                  nb::arg("bias").none(), nb::arg("columns").none(), "A float matrix [K, N].");
}

}  // namespace owl2

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <memory>

#include "binding.h"
#include "cpu.h"

namespace owl2 {
namespace {

template <class T>
using Matrix = nb::ndarray<const T, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<const T, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::numpy, nb::ndim<2>>;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kBetweenSignals{20};

// Told by any thread that a step has to end.
struct Stop {
  std::atomic<bool> asked{false};
};

KvType kv_type(const std::string& name) {
  if (name == "fp32") return KvType::f32;
  if (name == "fp16") return KvType::f16;
  if (name == "int8") return KvType::i8;
  throw std::invalid_argument("a K/V cache of " + name);
}

// Asks a Stop, and gives Python's handlers of signals a chance, which run in the main thread alone.
class Watch {
 public:
  explicit Watch(const Stop& stop) : stop_(stop), next_(Clock::now() + kBetweenSignals) {}

  bool stopped() {
    if (stop_.asked || error_ != nullptr) return true;
    if (Clock::now() < next_) return false;
    next_ = Clock::now() + kBetweenSignals;
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) error_ = std::make_unique<nb::python_error>();
    return error_ != nullptr;
  }

  void raise() {
    if (error_ != nullptr) throw nb::python_error(std::move(*error_));
  }

 private:
  const Stop& stop_;
  Clock::time_point next_;
  std::unique_ptr<nb::python_error> error_;
};

// A decoder with what it needs: threads, kernels, and the objects that its weights are views of.
class Model {
 public:
  Model(int width, int inner, int heads, int vocabulary, float epsilon, int threads)
      : pool_(threads), kernels_(choose_kernels()) {
    if (width <= 0 || inner <= 0 || heads <= 0 || vocabulary <= 0 || width % heads != 0 || width / heads % 2 != 0 ||
        width / heads > kWidestHead)
      throw std::invalid_argument("a decoder of these sizes");
    shape_.width = width;
    shape_.inner = inner;
    shape_.heads = heads;
    shape_.vocabulary = vocabulary;
    shape_.epsilon = epsilon;
  }

  void add_layer(const View& input_gains, const View& post_gains, const std::vector<Linear>& linears) {
    if (linears.size() != 9) throw std::invalid_argument("a layer has nine linear layers");
    const size_t count = static_cast<size_t>(shape_.width);
    DecoderLayer layer;
    for (int i = 0; i < 2; i++) {
      layer.input_gains[i] = input_gains.as<float>(2 * count, "gains") + i * count;
      layer.post_gains[i] = post_gains.as<float>(2 * count, "gains") + i * count;
    }
    Linear* const targets[9] = {&layer.q, &layer.k[0], &layer.k[1], &layer.v[0], &layer.v[1],
                                &layer.o, &layer.gate, &layer.up,   &layer.down};
    for (int i = 0; i < 9; i++) {
      const int outputs = i == 6 || i == 7 ? shape_.inner : shape_.width;
      const int inputs = i == 8 ? shape_.inner : shape_.width;
      require_shape(linears[i], outputs, inputs);
      *targets[i] = linears[i];
    }
    weights_.layers.push_back(layer);
  }

  void finish(const View& norm, const Linear& head) {
    require_shape(head, shape_.vocabulary, shape_.width);
    weights_.norm = norm.as<float>(shape_.width, "norm");
    weights_.head = head;
    decoder_ = std::make_unique<Decoder>(shape_, std::move(weights_), kernels_, &pool_);
    layers_ = decoder_->layers();
  }

  // Returns None if it was stopped.
  nb::object step(const Matrix<float>& embeddings, const Vector<uint8_t>& modality, const Matrix<float>& cosines,
                  const Matrix<float>& sines, const std::vector<std::tuple<KvCache*, int, int>>& sequences,
                  const std::vector<int>& logit_rows, const Stop& stop) {
    Step step;
    const int rows = check(embeddings, modality, cosines, sines, sequences, logit_rows, &step);
    step.embeddings = embeddings.data();
    step.modality = modality.data();
    step.cosines = cosines.data();
    step.sines = sines.data();
    step.logit_rows = logit_rows;
    const size_t count = logit_rows.size(), vocabulary = static_cast<size_t>(shape_.vocabulary);
    auto logits = std::make_unique<float[]>(count * vocabulary);
    step.logits = logits.get();
    Watch watch(stop);
    step.stopped = [&] { return watch.stopped(); };
    bool complete = false;
    if (rows > 0) {
      nb::gil_scoped_release release;
      complete = decoder_->run(step);
    }
    watch.raise();
    if (!complete) return nb::none();
    float* const values = logits.release();
    const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return nb::cast(Logits(values, {count, vocabulary}, owner));
  }

 private:
  static constexpr int kWidestHead = 512;

  static void require_shape(const Linear& linear, int outputs, int inputs) {
    if (linear.outputs() != outputs || linear.inputs() != inputs)
      throw std::invalid_argument("a linear layer of " + std::to_string(linear.outputs()) + " x " +
                                  std::to_string(linear.inputs()) + " instead of " + std::to_string(outputs) + " x " +
                                  std::to_string(inputs));
  }

  int check(const Matrix<float>& embeddings, const Vector<uint8_t>& modality, const Matrix<float>& cosines,
            const Matrix<float>& sines, const std::vector<std::tuple<KvCache*, int, int>>& sequences,
            const std::vector<int>& logit_rows, Step* step) const {
    if (decoder_ == nullptr) throw std::logic_error("the model is not finished");
    int total = 0;
    for (const auto& [cache, past, rows] : sequences) {
      const KvShape& kv = cache->shape();
      if (kv.layers != layers_ || kv.heads != shape_.heads || kv.width != shape_.head_width())
        throw std::invalid_argument("a K/V cache of another model");
      if (past < 0 || rows <= 0 || rows > cache->capacity() - past)
        throw std::invalid_argument("more positions than the K/V cache holds");
      step->sequences.push_back({cache, past, rows});
      total += rows;
    }
    const size_t rows = static_cast<size_t>(total), half = static_cast<size_t>(shape_.head_width() / 2);
    if (embeddings.shape(0) != rows || embeddings.shape(1) != static_cast<size_t>(shape_.width) ||
        modality.shape(0) != rows || cosines.shape(0) != rows || cosines.shape(1) != half || sines.shape(0) != rows ||
        sines.shape(1) != half)
      throw std::invalid_argument("the arrays of a step do not have its rows");
    for (const int row : logit_rows)
      if (row < 0 || row >= total) throw std::invalid_argument("logits of a row that is not in the step");
    if (logit_rows.empty()) throw std::invalid_argument("a step without logits");
    return total;
  }

  Pool pool_;
  const Kernels& kernels_;
  DecoderShape shape_;
  DecoderWeights weights_;
  int layers_ = 0;
  std::unique_ptr<Decoder> decoder_;
};

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using GivenBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Bytes of each part of a cache's first positions.
std::vector<size_t> part_bytes(const KvCache& cache, int positions) {
  const KvShape& shape = cache.shape();
  if (positions <= 0 || positions > cache.capacity()) throw std::invalid_argument("positions that a K/V cache lacks");
  const size_t places = static_cast<size_t>(shape.layers) * shape.heads * positions;
  const size_t value = shape.type == KvType::f32 ? 4 : shape.type == KvType::f16 ? 2 : 1;
  std::vector<size_t> sizes(2, places * shape.width * value);
  if (shape.type == KvType::i8) sizes.resize(4, places * sizeof(float));
  return sizes;
}

nb::object read_cache(const KvCache& cache, int positions) {
  nb::list parts;
  std::vector<uint8_t*> data(4, nullptr);
  const std::vector<size_t> sizes = part_bytes(cache, positions);
  for (size_t i = 0; i < sizes.size(); i++) {
    data[i] = new uint8_t[sizes[i]];
    const nb::capsule owner(data[i], [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    parts.append(Bytes(data[i], {sizes[i]}, owner));
  }
  {
    nb::gil_scoped_release release;
    cache.read(positions, data[0], data[1], reinterpret_cast<float*>(data[2]), reinterpret_cast<float*>(data[3]));
  }
  return nb::tuple(parts);
}

void write_cache(KvCache* cache, int positions, const std::vector<GivenBytes>& parts) {
  const std::vector<size_t> sizes = part_bytes(*cache, positions);
  std::vector<const uint8_t*> data(4, nullptr);
  if (parts.size() != sizes.size()) throw std::invalid_argument("parts of another type of K/V cache");
  for (size_t i = 0; i < sizes.size(); i++) {
    data[i] = parts[i].data();
    if (parts[i].shape(0) != sizes[i] || reinterpret_cast<uintptr_t>(data[i]) % 4 != 0)
      throw std::invalid_argument("a part of a K/V cache has " + std::to_string(parts[i].shape(0)) +
                                  " bytes instead of " + std::to_string(sizes[i]) + ", or they are not aligned");
  }
  nb::gil_scoped_release release;
  cache->write(positions, data[0], data[1], reinterpret_cast<const float*>(data[2]),
               reinterpret_cast<const float*>(data[3]));
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Stop>(m, "Stop", "Ends a step; any thread may set it.").def(nb::init<>()).def("set", [](Stop& stop) {
    stop.asked = true;
  });

  nb::class_<KvCache>(m, "KvCache", "Keys and values of one sequence; copies share memory until one is written to.")
      .def(
          "__init__",
          [](KvCache* self, int layers, int heads, int width, const std::string& type, int capacity) {
            if (layers <= 0 || heads <= 0 || width <= 0 || capacity <= 0)
              throw std::invalid_argument("a K/V cache of these sizes");
            KvShape shape;
            shape.layers = layers;
            shape.heads = heads;
            shape.width = width;
            shape.type = kv_type(type);
            new (self) KvCache(shape, capacity);
          },
          nb::arg("layers"), nb::arg("heads"), nb::arg("width"), nb::arg("type"), nb::arg("capacity"))
      .def("resized", &KvCache::resized, nb::arg("capacity"), "A copy with room for other positions.")
      .def_prop_ro("capacity", &KvCache::capacity)
      .def_prop_ro("nbytes", &KvCache::bytes)
      .def("read", &read_cache, nb::arg("positions"),
           nb::sig("def read(self, positions: int) -> tuple[numpy.typing.NDArray[numpy.uint8], ...]"),
           "Bytes of the keys and of the values [layers, heads, positions, width], and with int8 of their scales.")
      .def("write", &write_cache, nb::arg("positions"), nb::arg("parts"),
           nb::sig("def write(self, positions: int, parts: Sequence[numpy.typing.NDArray[numpy.uint8]]) -> None"),
           "Make what read() gave the first positions.");

  nb::class_<Model>(m, "Decoder", "The decoder of a model. The views of its weights must outlive it.")
      .def(nb::init<int, int, int, int, float, int>(), nb::arg("width"), nb::arg("inner"), nb::arg("heads"),
           nb::arg("vocabulary"), nb::arg("epsilon"), nb::arg("threads"))
      .def("add_layer", &Model::add_layer, nb::arg("input_gains"), nb::arg("post_gains"), nb::arg("linears"),
           "Linears are q, k and v of text and of images (k, k, v, v), o, gate, up, down.")
      .def("finish", &Model::finish, nb::arg("norm"), nb::arg("head"))
      .def("step", &Model::step, nb::arg("embeddings").noconvert(), nb::arg("modality").noconvert(),
           nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(), nb::arg("sequences"), nb::arg("logit_rows"),
           nb::arg("stop"),
           nb::sig("def step(self, embeddings: numpy.typing.NDArray[numpy.float32], "
                   "modality: numpy.typing.NDArray[numpy.uint8], cosines: numpy.typing.NDArray[numpy.float32], "
                   "sines: numpy.typing.NDArray[numpy.float32], sequences: Sequence[tuple[KvCache, int, int]], "
                   "logit_rows: Sequence[int], stop: Stop) -> numpy.typing.NDArray[numpy.float32] | None"),
           "Run new rows [M, C] of sequences (cache, past, rows): -> logits float32 [R, V], None if it was stopped.");
}

}  // namespace owl2

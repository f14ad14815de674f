// The ops of the CUDA library, in the namespace bucketmoo_ds_cuda, on PyTorch's stable ABI: one library serves every
// PyTorch from 2.11 on. Host code only, and no CUDA header: it compiles where PyTorch has no CUDA. Input is checked by
// bucketmoo_ds.ops.backends.checks; the tables of tiles come from bucketmoo_ds/ops/backends/cuda.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "launch.h"

// In PyTorch's stable C interface; its header shows it to those only that have CUDA's headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using bucketmoo::Dtype;
using bucketmoo::Incoming;
using bucketmoo::Rows;
using bucketmoo::Tile;
using bucketmoo::Tiles;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default: STD_TORCH_CHECK(false, "bucketmoo_ds CUDA backend: rows of an unknown dtype");
  }
}

Rows rows_of(const std::vector<Tensor>& tensors) {
  Rows rows{};
  STD_TORCH_CHECK(
      !tensors.empty() && tensors.size() <= bucketmoo::kMaxRows, "bucketmoo_ds CUDA backend: expected 1 to 64 rows");
  rows.count = static_cast<int32_t>(tensors.size());
  rows.dtype = dtype_of(tensors[0]);
  std::ranges::transform(tensors, rows.data, [](const Tensor& tensor) { return tensor.const_data_ptr(); });
  return rows;
}

// `table` [tiles, 3] int64 (start, length, cell) and `first` [cells + 1] int64, on the device.
Tiles tiles_of(const Tensor& table, const Tensor& first, int64_t inside) {
  return {
      reinterpret_cast<const Tile*>(table.const_data_ptr<int64_t>()), first.const_data_ptr<int64_t>(), inside,
      table.size(0) - inside, first.size(0) - 1};
}

Tensor new_double(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Double);
}

Tensor new_grams(const Tensor& like, int64_t cells, int64_t rows) { return new_double(like, {cells, rows, rows}); }

// Makes a tensor's device the current one, and has its current stream.
struct OnDevice {
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
  void* handle() const { return stream; }

  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

Tensor gram(std::vector<Tensor> tensors, Tensor table, Tensor first, int64_t inside) {
  const OnDevice device(tensors[0]);
  const Rows rows = rows_of(tensors);
  const Tiles tiles = tiles_of(table, first, inside);
  const Tensor partials = new_grams(tensors[0], bucketmoo::gram_slots(rows, tiles), rows.count);
  const Tensor result = new_grams(tensors[0], tiles.cells, rows.count);
  bucketmoo::gram(
      rows, tiles, partials.mutable_data_ptr<double>(), result.mutable_data_ptr<double>(), device.handle());
  return result;
}

Tensor accumulate_gram(
    std::vector<Tensor> tensors, Tensor gradients, std::vector<int64_t> places, std::vector<int64_t> offsets,
    std::vector<double> scales, std::vector<int64_t> fresh, Tensor table, Tensor first, int64_t inside, bool last) {
  const OnDevice device(tensors[0]);
  const Rows rows = rows_of(tensors);
  const Tiles tiles = tiles_of(table, first, inside);
  STD_TORCH_CHECK(
      places.size() <= bucketmoo::kMaxIncoming && scales.size() == places.size() &&
          offsets.size() == tensors.size() + 1,
      "bucketmoo_ds CUDA backend: accumulate_gram takes at most 64 gradients a launch, sorted by row");
  Incoming incoming{};
  incoming.dtype = dtype_of(gradients);
  const auto* begin = static_cast<const char*>(gradients.const_data_ptr());
  const int64_t step = gradients.stride(0) * static_cast<int64_t>(gradients.element_size());
  std::ranges::transform(places, incoming.data, [&](int64_t place) { return begin + place * step; });
  std::ranges::transform(scales, incoming.scale, [](double scale) { return static_cast<float>(scale); });
  std::ranges::transform(offsets, incoming.first, [](int64_t offset) { return static_cast<int32_t>(offset); });
  for (const int64_t row : fresh) incoming.fresh |= uint64_t{1} << row;
  const int64_t slots = last ? bucketmoo::accumulate_slots(rows, tiles) : 0;
  const Tensor partials = new_grams(tensors[0], slots, rows.count);
  const Tensor result = new_grams(tensors[0], last ? tiles.cells : 0, rows.count);
  bucketmoo::accumulate_gram(
      rows, incoming, tiles, last, partials.mutable_data_ptr<double>(), result.mutable_data_ptr<double>(),
      device.handle());
  return result;
}

struct Weights {
  explicit Weights(const Tensor& mask)
      : weights(new_double(mask, {mask.size(0), mask.size(1)})),
        finite(torch::stable::new_empty(mask, std::vector<int64_t>{mask.size(0)}, ScalarType::Bool)) {}

  Tensor weights;
  Tensor finite;
};

void min_norm_into(const Tensor& gram, const Tensor& mask, double max_weight, const Weights& result, void* stream) {
  bucketmoo::min_norm(
      gram.const_data_ptr<double>(), mask.const_data_ptr<bool>(), mask.size(0), static_cast<int>(mask.size(1)),
      max_weight, result.weights.mutable_data_ptr<double>(), result.finite.mutable_data_ptr<bool>(), stream);
}

std::tuple<Tensor, Tensor> min_norm(Tensor gram, Tensor mask, double max_weight) {
  const OnDevice device(gram);
  const Weights result(mask);
  min_norm_into(gram, mask, max_weight, result, device.handle());
  return {result.weights, result.finite};
}

void combine(
    std::vector<Tensor> tensors, Tensor weights, Tensor table, Tensor first, int64_t inside, Tensor out,
    bool backward) {
  const OnDevice device(tensors[0]);
  bucketmoo::combine(
      rows_of(tensors), weights.const_data_ptr<double>(), tiles_of(table, first, inside), out.mutable_data_ptr(),
      dtype_of(out), backward, device.handle());
}

// `fused`: in one launch if the rows fit into L2, and the device takes it: it may refuse one that needs all of its
// multiprocessors at once, where others have a part of them.
std::tuple<Tensor, Tensor, Tensor> resolve(
    std::vector<Tensor> tensors, Tensor mask, double max_weight, Tensor table, Tensor first, int64_t inside, Tensor out,
    bool fused) {
  const OnDevice device(tensors[0]);
  const Rows rows = rows_of(tensors);
  const Tiles tiles = tiles_of(table, first, inside);
  const Weights result(mask);
  const int64_t slots = fused ? bucketmoo::resolve_slots(rows, tiles, tensors[0].numel()) : 0;
  if (slots > 0) {
    const Tensor partials = new_grams(tensors[0], slots, rows.count);
    const Tensor grams = new_grams(tensors[0], tiles.cells, rows.count);
    try {
      bucketmoo::resolve(
          rows, tiles, mask.const_data_ptr<bool>(), max_weight, partials.mutable_data_ptr<double>(),
          grams.mutable_data_ptr<double>(), result.weights.mutable_data_ptr<double>(),
          result.finite.mutable_data_ptr<bool>(), out.mutable_data_ptr(), dtype_of(out), device.handle());
      return {grams, result.weights, result.finite};
    } catch (const bucketmoo::NotTogether&) {  // nothing has run; a fault of the device shows again below
    }
  }
  const Tensor grams = gram(tensors, table, first, inside);
  min_norm_into(grams, mask, max_weight, result, device.handle());
  combine(tensors, result.weights, table, first, inside, out, true);
  return {grams, result.weights, result.finite};
}

}  // namespace

STABLE_TORCH_LIBRARY(bucketmoo_ds_cuda, library) {
  library.def("gram(Tensor[] rows, Tensor tiles, Tensor first, int inside) -> Tensor");
  library.def(
      "accumulate_gram(Tensor(a!)[] rows, Tensor gradients, int[] places, int[] offsets, float[] scales, int[] fresh, "
      "Tensor tiles, Tensor first, int inside, bool last) -> Tensor");
  library.def("min_norm(Tensor gram, Tensor mask, float max_weight) -> (Tensor, Tensor)");
  library.def(
      "combine(Tensor[] rows, Tensor weights, Tensor tiles, Tensor first, int inside, Tensor(a!) out, bool backward) "
      "-> ()");
  library.def(
      "resolve(Tensor[] rows, Tensor mask, float max_weight, Tensor tiles, Tensor first, int inside, Tensor(a!) out, "
      "bool fused) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bucketmoo_ds_cuda, CUDA, library) {
  library.impl("gram", TORCH_BOX(&gram));
  library.impl("accumulate_gram", TORCH_BOX(&accumulate_gram));
  library.impl("min_norm", TORCH_BOX(&min_norm));
  library.impl("combine", TORCH_BOX(&combine));
  library.impl("resolve", TORCH_BOX(&resolve));
}

// The ops of the CPU library, in the namespace bucketmoo_ds_cpu, on PyTorch's stable ABI: one library serves every
// PyTorch from 2.11 on. Input is checked by bucketmoo_ds.ops.backends.checks.
//
// Sums are cut the same way whatever the number of threads, and added up in the order of the shard: results are equal
// to the bit from run to run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "min_norm.h"
#include "pieces.h"

namespace {

using bucketmoo::Dtype;
using bucketmoo::kMaxRows;
using bucketmoo::Kernels;
using bucketmoo::Piece;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Those that run on this machine, the fastest first.
std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (const Kernels* kernels = bucketmoo::avx512_kernels()) found.push_back(kernels);
  if (const Kernels* kernels = bucketmoo::avx2_kernels()) found.push_back(kernels);
#endif
  found.push_back(bucketmoo::baseline_kernels());
  return found;
}

std::string instruction_sets() {
  std::string names;
  for (const Kernels* kernels : all_kernels()) names += (names.empty() ? "" : " ") + std::string(kernels->name);
  return names;
}

// Of the instruction set of that name, or the fastest for "".
const Kernels& kernels_for(const std::string& name) {
  static const std::vector<const Kernels*> all = all_kernels();
  for (const Kernels* kernels : all)
    if (name.empty() || name == kernels->name) return *kernels;
  STD_TORCH_CHECK(false, "bucketmoo_ds CPU backend: this machine has no instruction set ", name);
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "bucketmoo_ds CPU backend: rows of an unknown dtype");
  }
}

struct Rows {
  explicit Rows(const std::vector<Tensor>& tensors) : count(static_cast<int>(tensors.size())) {
    STD_TORCH_CHECK(count >= 1 && count <= kMaxRows, "bucketmoo_ds CPU backend: expected 1 to 64 rows");
    dtype = dtype_of(tensors[0]);
    elements = tensors[0].numel();
    for (int row = 0; row < count; ++row) data[row] = tensors[row].const_data_ptr();
  }

  int count;
  Dtype dtype;
  int64_t elements;
  const void* data[kMaxRows];
};

bucketmoo::Segments segments_of(const Tensor& spans, const Tensor& cells, int64_t elements) {
  return {spans.const_data_ptr<int64_t>(), cells.const_data_ptr<int64_t>(), cells.numel(), elements};
}

Tensor new_zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

// Calls run(pieces begin, end) of every task, tasks shared out among the threads.
template <class Run>
void for_tasks(const std::vector<int64_t>& begins, const Run& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(begins.size()) - 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) run(begins[task], begins[task + 1], task);
  });
}

// The partial Gram of the pieces of one cell in one task: a triangle of `pairs` sums.
struct Runs {
  Runs(const std::vector<Piece>& pieces, const std::vector<int64_t>& begins) {
    for (size_t task = 0; task + 1 < begins.size(); ++task) {
      first.push_back(static_cast<int64_t>(cells.size()));
      int64_t before = bucketmoo::kNoCell;
      for (int64_t i = begins[task]; i < begins[task + 1]; ++i) {
        if (pieces[i].cell == bucketmoo::kNoCell) continue;
        if (pieces[i].cell != before) cells.push_back(pieces[i].cell);
        before = pieces[i].cell;
      }
    }
  }

  std::vector<int64_t> first;   // by task, its first run
  std::vector<int64_t> cells;  // by run
};

// Adds up the partials in the order of the runs, and writes out both triangles.
void add_partials(const Runs& runs, const std::vector<double>& partials, int count, double* grams) {
  const int pairs = bucketmoo::pair_count(count);
  for (size_t run = 0; run < runs.cells.size(); ++run) {
    double* gram = grams + runs.cells[run] * count * count;
    const double* partial = partials.data() + run * pairs;
    for (int i = 0; i < count; ++i)
      for (int j = 0; j <= i; ++j) gram[i * count + j] += partial[bucketmoo::pair_index(i, j)];
  }
  for (size_t run = 0; run < runs.cells.size(); ++run) {
    double* gram = grams + runs.cells[run] * count * count;
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < i; ++j) gram[j * count + i] = gram[i * count + j];
  }
}

// Calls prepare(piece) for every piece, and adds up the Grams of those that have a cell.
template <class Prepare>
Tensor gram_of_pieces(const Kernels& kernels, const Tensor& like, const Rows& rows, std::vector<Piece> pieces,
                      int64_t num_cells, const Prepare& prepare) {
  bucketmoo::sort_by_cell(pieces);
  const std::vector<int64_t> begins = bucketmoo::deal(pieces);
  const Runs runs(pieces, begins);
  const int64_t pairs = bucketmoo::pair_count(rows.count);
  std::vector<double> partials(runs.cells.size() * pairs);
  for_tasks(begins, [&](int64_t begin, int64_t end, int64_t task) {
    int64_t run = runs.first[task] - 1;
    int64_t before = bucketmoo::kNoCell;
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      prepare(piece);
      if (piece.cell == bucketmoo::kNoCell) continue;
      if (piece.cell != before) ++run;
      before = piece.cell;
      const int64_t next = i + 1 < end ? pieces[i + 1].begin : piece.begin + piece.count;
      kernels.gram(rows.data, rows.dtype, rows.count, piece.begin, piece.count, next, partials.data() + run * pairs);
    }
  });
  const Tensor grams = new_zeros(like, {num_cells, rows.count, rows.count}, ScalarType::Double);
  add_partials(runs, partials, rows.count, grams.mutable_data_ptr<double>());
  return grams;
}

Tensor gram(std::vector<Tensor> tensors, Tensor spans, Tensor cells, int64_t num_cells, std::string instruction_set) {
  const Rows rows(tensors);
  std::vector<Piece> pieces = bucketmoo::cut(segments_of(spans, cells, rows.elements), false);
  return gram_of_pieces(kernels_for(instruction_set), tensors[0], rows, std::move(pieces), num_cells,
                        [](const Piece&) {});
}

Tensor accumulate_gram(std::vector<Tensor> tensors, Tensor incoming, std::vector<int64_t> targets,
                       std::vector<double> scales, std::vector<int64_t> fresh, Tensor spans, Tensor cells,
                       int64_t num_cells, std::string instruction_set) {
  const Kernels& kernels = kernels_for(instruction_set);
  const Rows rows(tensors);
  struct Addition {
    float* row;
    const void* gradient;
    float scale;
    bool fresh;
  };
  const Dtype dtype = dtype_of(incoming);
  const auto* first = static_cast<const char*>(incoming.const_data_ptr());
  const int64_t step = incoming.stride(0) * static_cast<int64_t>(incoming.element_size());
  std::vector<Addition> additions;
  for (size_t i = 0; i < targets.size(); ++i) {
    const int64_t target = targets[i];
    if (target < 0) continue;
    additions.push_back({tensors[target].mutable_data_ptr<float>(), first + static_cast<int64_t>(i) * step,
                         static_cast<float>(scales[i]), fresh[target] != 0});
    fresh[target] = 0;  // the next one is added
  }
  std::vector<Piece> pieces = bucketmoo::cut(segments_of(spans, cells, rows.elements), true);
  return gram_of_pieces(kernels, tensors[0], rows, std::move(pieces), num_cells, [&](const Piece& piece) {
    for (const Addition& each : additions)
      kernels.accumulate(each.row, each.gradient, dtype, each.scale, each.fresh, piece.begin, piece.count);
  });
}

std::tuple<Tensor, Tensor> min_norm(Tensor gram, Tensor mask, double max_weight) {
  const int64_t blocks = mask.size(0), rows = mask.size(1);
  const Tensor weights = new_zeros(gram, {blocks, rows}, ScalarType::Double);
  const Tensor finite = new_zeros(gram, {blocks}, ScalarType::Bool);
  const int64_t grain = 1 + 512 / (rows * rows);  // smaller blocks are solved before a thread has woken up
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    bucketmoo_min_norm(gram.const_data_ptr<double>(), mask.const_data_ptr<bool>(), max_weight,
                       weights.mutable_data_ptr<double>(), finite.mutable_data_ptr<bool>(), begin, end, rows, nullptr);
  });
  return {weights, finite};
}

void combine(std::vector<Tensor> tensors, Tensor weights, Tensor spans, Tensor cells, Tensor out,
             std::string instruction_set) {
  const Kernels& kernels = kernels_for(instruction_set);
  const Rows rows(tensors);
  const double* given = weights.const_data_ptr<double>();
  void* to = out.mutable_data_ptr();
  const Dtype dtype = dtype_of(out);
  const std::vector<Piece> pieces = bucketmoo::cut(segments_of(spans, cells, rows.elements), true);
  for_tasks(bucketmoo::deal(pieces), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      const void* used[kMaxRows];
      double weight[kMaxRows];
      int count = 0;
      for (int row = 0; row < rows.count && piece.cell != bucketmoo::kNoCell; ++row) {
        weight[count] = given[piece.cell * rows.count + row];
        used[count] = rows.data[row];
        if (weight[count] != 0.0) ++count;
      }
      kernels.combine(used, rows.dtype, weight, count, piece.begin, piece.count, to, dtype);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(bucketmoo_ds_cpu, library) {
  library.def("instruction_sets() -> str");
  library.def("gram(Tensor[] rows, Tensor spans, Tensor cells, int num_cells, str instruction_set) -> Tensor");
  library.def(
      "accumulate_gram(Tensor(a!)[] rows, Tensor incoming, int[] targets, float[] scales, int[] fresh, "
      "Tensor spans, Tensor cells, int num_cells, str instruction_set) -> Tensor");
  library.def("min_norm(Tensor gram, Tensor mask, float max_weight) -> (Tensor, Tensor)");
  library.def(
      "combine(Tensor[] rows, Tensor weights, Tensor spans, Tensor cells, Tensor(a!) out, str instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bucketmoo_ds_cpu, CompositeExplicitAutograd, library) {
  library.impl("instruction_sets", TORCH_BOX(&instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(bucketmoo_ds_cpu, CPU, library) {
  library.impl("gram", TORCH_BOX(&gram));
  library.impl("accumulate_gram", TORCH_BOX(&accumulate_gram));
  library.impl("min_norm", TORCH_BOX(&min_norm));
  library.impl("combine", TORCH_BOX(&combine));
}

// combine: the weighted sum of the rows, cell by cell.
#include "combine.cuh"
#include "gram_launch.cuh"

namespace bucketmoo {
namespace {

template <class Format>
__global__ void __launch_bounds__(kCombineThreads, 3) combine_kernel(
    const __grid_constant__ Rows rows, const double* weights, const __grid_constant__ Tiles tiles, int shift, void* out,
    Dtype out_dtype, int64_t parts, bool backward) {
  combine_tiles<Format>(rows, weights, tiles, shift, out, out_dtype, parts, backward, shared_memory());
}

template <class Format>
void launch_combine(
    const Rows& rows, const double* weights, const Tiles& tiles, void* out, Dtype out_dtype, bool backward,
    void* stream) {
  constexpr int kSharedBytes = sizeof(Chosen<typename Widened<Format>::Real>);
  const int64_t all = tiles.inside + tiles.outside;
  if (all == 0) return;
  // Backward only pays where the ranges are those which `gram` has walked.
  const int64_t parts = backward ? gram_slots(rows, tiles) - tiles.cells : std::min<int64_t>(1, tiles.inside);
  const int64_t wave =
      int64_t{current_device().multiprocessors} *
      blocks_per_multiprocessor(combine_kernel<Format>, kCombineThreads, kSharedBytes, "combine");
  launch("combine", combine_kernel<Format>, {std::min(wave, all), kCombineThreads, kSharedBytes}, stream, rows, weights,
         tiles, common_shift(rows), out, out_dtype, parts, backward);
}

}  // namespace

void combine(
    const Rows& rows, const double* weights, const Tiles& tiles, void* out, Dtype out_dtype, bool backward,
    void* stream) {
  const auto go = [&]<class Format>() {
    launch_combine<Format>(rows, weights, tiles, out, out_dtype, backward, stream);
  };
  switch (rows.dtype) {
    case Dtype::kFloat32: return go.operator()<Float32Format>();
    case Dtype::kBFloat16: return go.operator()<BFloat16Format>();
    case Dtype::kFloat16: return go.operator()<Float16Format>();
    case Dtype::kFloat64: return go.operator()<Float64Format>();
  }
}

}  // namespace bucketmoo

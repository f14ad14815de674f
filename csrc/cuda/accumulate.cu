// accumulate_gram: the last micro-step's gradients are added to the rows, and the Gram taken, in one pass.
#include "accumulate.cuh"
#include "gram_launch.cuh"

namespace bucketmoo {
namespace {

template <class Gram>
__global__ void __launch_bounds__(Gram::kThreads, Gram::kResident) accumulate_kernel(
    const __grid_constant__ Rows rows, const __grid_constant__ Incoming incoming, const __grid_constant__ Tiles tiles,
    int shift, double* partials) {
  const UpdateSource source{incoming};
  gram_tiles<Gram>(rows, source, tiles, shift, partials, shared_memory());
  for (int64_t tile = blockIdx.x; tile < tiles.outside; tile += gridDim.x) {
    update_tile(rows, source, tiles.data[tiles.inside + tile], shift);
  }
}

constexpr int kUpdateThreads = 256;

__global__ void __launch_bounds__(kUpdateThreads) update_kernel(
    const __grid_constant__ Rows rows, const __grid_constant__ Incoming incoming, const __grid_constant__ Tiles tiles,
    int shift) {
  const UpdateSource source{incoming};
  for (int64_t tile = blockIdx.x; tile < tiles.inside + tiles.outside; tile += gridDim.x) {
    update_tile(rows, source, tiles.data[tile], shift);
  }
}

template <class Gram>
Layout accumulate_layout(const Tiles& tiles) {
  return layout_of<Gram>(tiles, accumulate_kernel<Gram>, "accumulate_gram");
}

}  // namespace

int64_t accumulate_slots(const Rows& rows, const Tiles& tiles) {
  return dispatch_float32(rows, [&]<class Gram>() { return slots(tiles, accumulate_layout<Gram>(tiles).parts); });
}

void accumulate_gram(
    const Rows& rows, const Incoming& incoming, const Tiles& tiles, bool last, double* partials, double* gram,
    void* stream) {
  if (!last) {
    const int64_t all = tiles.inside + tiles.outside;
    if (all == 0) return;
    launch("accumulate_gram, adding only", update_kernel, {std::min<int64_t>(all, 1 << 20), kUpdateThreads, 0}, stream,
           rows, incoming, tiles, common_shift(rows));
    return;
  }
  dispatch_float32(rows, [&]<class Gram>() {
    const Layout layout = accumulate_layout<Gram>(tiles);
    // Without a segment there is no Gram to take, yet rows to add to.
    const int64_t blocks = layout.parts > 0 ? layout.parts : std::min<int64_t>(tiles.outside, 1024);
    if (blocks > 0) {
      launch("accumulate_gram", accumulate_kernel<Gram>, {blocks, layout.threads, layout.shared_bytes}, stream, rows,
             incoming, tiles, common_shift(rows), partials);
    }
    launch_add_partials(rows.count, tiles, layout.parts, partials, gram, stream);
  });
}

}  // namespace bucketmoo

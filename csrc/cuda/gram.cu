// Grams of rows as they are: the partial Grams of every block of threads, then their sums.
#include "gram_launch.cuh"

namespace bucketmoo {
namespace {

template <class Gram>
__global__ void __launch_bounds__(Gram::kThreads, Gram::kResident)
    gram_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Tiles tiles, int shift, double* partials) {
  gram_tiles<Gram>(rows, PlainSource{}, tiles, shift, partials, shared_memory());
}

}  // namespace

int64_t gram_slots(const Rows& rows, const Tiles& tiles) {
  return dispatch_gram(rows, [&]<class Gram>() {
    return slots(tiles, layout_of<Gram>(tiles, gram_kernel<Gram>, "gram").parts);
  });
}

void gram(const Rows& rows, const Tiles& tiles, double* partials, double* gram, void* stream) {
  dispatch_gram(rows, [&]<class Gram>() {
    const Layout layout = layout_of<Gram>(tiles, gram_kernel<Gram>, "gram");
    if (layout.parts > 0) {
      launch("gram", gram_kernel<Gram>, {layout.parts, layout.threads, layout.shared_bytes}, stream, rows, tiles,
             common_shift(rows), partials);
    }
    launch_add_partials(rows.count, tiles, layout.parts, partials, gram, stream);
  });
}

}  // namespace bucketmoo

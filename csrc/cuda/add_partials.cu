// The second stage of a Gram: the partials of every cell, added up in a fixed order.
#include "gram_launch.cuh"

namespace bucketmoo {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) add_partials_kernel(
    const double* partials, const __grid_constant__ Tiles tiles, int64_t parts, int count, double* gram) {
  add_partials(partials, tiles, parts, count, gram);
}

}  // namespace

void launch_add_partials(
    int count, const Tiles& tiles, int64_t parts, const double* partials, double* gram, void* stream) {
  const int64_t warps = tiles.cells * count * count;
  if (warps == 0) return;
  const int64_t blocks = (warps + kThreads / kWarp - 1) / (kThreads / kWarp);
  launch("gram, adding up", add_partials_kernel, {std::min<int64_t>(blocks, 1 << 20), kThreads, 0}, stream, partials,
         tiles, parts, count, gram);
}

}  // namespace bucketmoo

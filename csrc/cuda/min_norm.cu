// min_norm: one warp a Gram, all Grams in one launch.
#include "min_norm.cuh"

namespace bucketmoo {
namespace {

__global__ void __launch_bounds__(kWarp) min_norm_kernel(
    const double* gram, const bool* mask, int64_t blocks, int rows, double max_weight, double* weights, bool* finite) {
  WarpMinNorm solver(shared_memory(), rows);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    solver.solve(gram + block * rows * rows, mask + block * rows, max_weight, finite + block);
    copy_weights(solver, rows, weights + block * rows);
  }
}

}  // namespace

void min_norm(
    const double* gram, const bool* mask, int64_t blocks, int rows, double max_weight, double* weights, bool* finite,
    void* stream) {
  if (blocks == 0) return;
  launch("min_norm", min_norm_kernel,
         {blocks < (1 << 20) ? blocks : 1 << 20, kWarp, WarpMinNorm::scratch_bytes(rows)}, stream, gram, mask, blocks,
         rows, max_weight, weights, finite);
}

}  // namespace bucketmoo

// resolve in one cooperative launch: Gram, grid barrier, sums and weights, grid barrier, combination. Every block
// combines the tiles which it has taken the Gram of, the last first: while all rows fit into L2, they are read from
// memory once.
#pragma once

#include "combine.cuh"
#include "gram_launch.cuh"
#include "min_norm.cuh"

namespace bucketmoo {

struct Resolve {
  Rows rows;
  Tiles tiles;
  int shift;
  int solvers;  // warps of a block that have shared memory to solve a Gram each
  const bool* mask;
  double max_weight;
  double* partials;
  double* gram;
  double* weights;
  bool* finite;
  void* out;
  Dtype out_dtype;
};

template <class Gram>
__global__ void __launch_bounds__(Gram::kThreads, Gram::kResident)
    resolve_kernel(const __grid_constant__ Resolve problem) {
  const Rows& rows = problem.rows;
  const Tiles& tiles = problem.tiles;
  char* shared = shared_memory();
  gram_tiles<Gram>(rows, PlainSource{}, tiles, problem.shift, problem.partials, shared);
  grid_barrier();
  add_partials(problem.partials, tiles, gridDim.x, rows.count, problem.gram);
  grid_barrier();
  const int warp = threadIdx.x / kWarp;
  if (warp < problem.solvers) {
    WarpMinNorm solver(shared + warp * WarpMinNorm::scratch_bytes(rows.count), rows.count);
    for (int64_t cell = blockIdx.x + int64_t{gridDim.x} * warp; cell < tiles.cells;
         cell += int64_t{gridDim.x} * problem.solvers) {
      solver.solve(
          problem.gram + cell * rows.count * rows.count, problem.mask + cell * rows.count, problem.max_weight,
          problem.finite + cell);
      copy_weights(solver, rows.count, problem.weights + cell * rows.count);
    }
  }
  grid_barrier();
  combine_tiles<typename Gram::Elements>(
      rows, problem.weights, tiles, problem.shift, problem.out, problem.out_dtype, gridDim.x, true, shared);
}

template <class Gram>
Layout resolve_layout(const Rows& rows, const Tiles& tiles) {
  const int least = std::max<int>(WarpMinNorm::scratch_bytes(rows.count), sizeof(Chosen<double>));
  return layout_of<Gram>(tiles, resolve_kernel<Gram>, "resolve", least);
}

template <class Gram>
int64_t resolve_parts(const Rows& rows, const Tiles& tiles) {
  return resolve_layout<Gram>(rows, tiles).parts;
}

template <class Gram>
void launch_resolve(Resolve problem, void* stream) {
  const Layout layout = resolve_layout<Gram>(problem.rows, problem.tiles);
  problem.solvers =
      std::min(layout.threads / kWarp, layout.shared_bytes / WarpMinNorm::scratch_bytes(problem.rows.count));
  launch("resolve", resolve_kernel<Gram>, {layout.parts, layout.threads, layout.shared_bytes, true}, stream, problem);
}

// One translation unit a dtype, so that they compile side by side.
int64_t resolve_parts_float(const Rows& rows, const Tiles& tiles);
int64_t resolve_parts_bfloat16(const Rows& rows, const Tiles& tiles);
int64_t resolve_parts_float16(const Rows& rows, const Tiles& tiles);
void launch_resolve_float(const Resolve& problem, void* stream);
void launch_resolve_bfloat16(const Resolve& problem, void* stream);
void launch_resolve_float16(const Resolve& problem, void* stream);

}  // namespace bucketmoo

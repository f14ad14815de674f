// What the launches of gram, accumulate_gram and resolve share: which kernel for which rows, and how many blocks.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "gram.cuh"

namespace bucketmoo {

// Calls `launch` with the Gram of float32 rows.
template <class Launch>
auto dispatch_float32(const Rows& rows, const Launch& launch) {
  if (rows.count <= 2) return launch.template operator()<ChainGram<2>>();
  if (rows.count <= 4) return launch.template operator()<ChainGram<4>>();
  if (rows.count <= 8) return launch.template operator()<ChainGram<8>>();
  return launch.template operator()<StagedGram<float>>();
}

template <class Format, class Launch>
auto dispatch_tensor(const Rows& rows, const Launch& launch) {
  if (rows.count <= 8) return launch.template operator()<TensorGram<Format, 1>>();
  if (rows.count <= 16) return launch.template operator()<TensorGram<Format, 2>>();
  if (rows.count <= 32) return launch.template operator()<TensorGram<Format, 4>>();
  return launch.template operator()<TensorGram<Format, 8>>();
}

template <class Launch>
auto dispatch_gram(const Rows& rows, const Launch& launch) {
  switch (rows.dtype) {
    case Dtype::kFloat32: return dispatch_float32(rows, launch);
    case Dtype::kBFloat16: return dispatch_tensor<BFloat16Format>(rows, launch);
    case Dtype::kFloat16: return dispatch_tensor<Float16Format>(rows, launch);
    case Dtype::kFloat64: return launch.template operator()<StagedGram<double>>();
  }
  throw std::runtime_error("bucketmoo_ds CUDA backend: unknown dtype of rows");
}

// Threads of a block, and blocks: one wave of them, each with at least one tile.
struct Layout {
  int64_t parts;
  int threads;
  int shared_bytes;
};

// A device with little shared memory gets smaller blocks. `least_shared` is what else the kernel needs it for.
template <class Gram, class Kernel>
Layout layout_of(const Tiles& tiles, Kernel kernel, const char* name, int least_shared = 0) {
  const Device device = current_device();
  int threads = Gram::kThreads;
  if (threads % 64 == 0 && threads * Gram::kThreadBytes > device.shared_bytes) threads /= 2;
  const int shared_bytes = std::max(threads * Gram::kThreadBytes, least_shared);
  const int64_t wave =
      int64_t{device.multiprocessors} * blocks_per_multiprocessor(kernel, threads, shared_bytes, name);
  return {std::min(wave, tiles.inside), threads, shared_bytes};
}

// Partials are named part + cell.
inline int64_t slots(const Tiles& tiles, int64_t parts) { return parts + tiles.cells; }

void launch_add_partials(
    int count, const Tiles& tiles, int64_t parts, const double* partials, double* gram, void* stream);

}  // namespace bucketmoo

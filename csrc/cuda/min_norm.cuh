// csrc/common/min_norm.h by one warp.
#pragma once

#include "../common/min_norm.h"
#include "common.cuh"

namespace bucketmoo {

struct OneWarp {
  static constexpr int kSize = kWarp;
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
  static __device__ __forceinline__ double sum(double value) { return warp_sum(value); }
  static __device__ __forceinline__ double largest(double value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmax(value, __shfl_xor_sync(kAll, value, offset));
    return value;
  }
  static __device__ __forceinline__ bool any(bool value) { return __any_sync(kAll, value); }
};

using WarpMinNorm = MinNorm<OneWarp>;

__device__ __forceinline__ void copy_weights(const WarpMinNorm& solver, int rows, double* weights) {
  for (int row = OneWarp::lane(); row < rows; row += kWarp) weights[row] = solver.weights()[row];
}

}  // namespace bucketmoo

// A source of float32 rows that adds the incoming gradients on the way from memory, and writes the rows back.
#pragma once

#include "gram.cuh"

namespace bucketmoo {

// The four elements at `position`, in float32; what lies outside of the window is 0.
__device__ __forceinline__ void load_four(
    const void* data, Dtype dtype, int64_t position, Window window, float (&values)[4]) {
  const int bytes = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  const char* address = static_cast<const char*>(data) + position * bytes;
  const bool whole = position >= window.begin && position + 4 <= window.end;
  if (dtype == Dtype::kFloat32 && whole && reinterpret_cast<uintptr_t>(address) % 16 == 0) {
    const float4 vector = *reinterpret_cast<const float4*>(address);
    values[0] = vector.x;
    values[1] = vector.y;
    values[2] = vector.z;
    values[3] = vector.w;
    return;
  }
  if (bytes == 2 && whole && reinterpret_cast<uintptr_t>(address) % 8 == 0) {
    const uint2 vector = *reinterpret_cast<const uint2*>(address);
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      const auto bits = static_cast<uint16_t>((element < 2 ? vector.x : vector.y) >> (element % 2 * 16));
      values[element] = dtype == Dtype::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
    }
    return;
  }
#pragma unroll
  for (int element = 0; element < 4; ++element) {
    values[element] = 0.0f;
    if (position + element < window.begin || position + element >= window.end) continue;
    if (dtype == Dtype::kFloat64) {
      values[element] = static_cast<float>(reinterpret_cast<const double*>(address)[element]);
    } else if (dtype == Dtype::kFloat32) {
      values[element] = reinterpret_cast<const float*>(address)[element];
    } else {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(address)[element];
      values[element] = dtype == Dtype::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
    }
  }
}

struct UpdateSource {
  const Incoming& incoming;

  template <int kBytes>
  __device__ __forceinline__ uint4 load(const char* data, int row, int64_t position, Window window) const {
    static_assert(kBytes == 4, "gradients are accumulated in float32");
    const int begin = incoming.first[row];
    const int end = incoming.first[row + 1];
    const bool fresh = (incoming.fresh >> row & 1) != 0;
    uint4 vector = make_uint4(0, 0, 0, 0);
    if (!fresh) vector = load_vector<kBytes>(data, position, window);
    if (begin == end) return vector;
    float sums[4];
#pragma unroll
    for (int element = 0; element < 4; ++element) sums[element] = __uint_as_float(word(vector, element));
#pragma unroll 1
    for (int index = begin; index < end; ++index) {
      float values[4];
      load_four(incoming.data[index], incoming.dtype, position, window, values);
      const float scale = incoming.scale[index];
      const bool overwrite = fresh && index == begin;
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        sums[element] = overwrite ? __fmul_rn(scale, values[element]) : fmaf(scale, values[element], sums[element]);
      }
    }
    // What lies outside of the window is not written, and must stay 0 for the Gram: inf * 0 is not.
    auto* address = reinterpret_cast<float*>(const_cast<char*>(data)) + position;
    if (window.vectors && position >= window.begin && position + 4 <= window.end) {
      *reinterpret_cast<float4*>(address) = make_float4(sums[0], sums[1], sums[2], sums[3]);
    } else {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        const bool inside = position + element >= window.begin && position + element < window.end;
        if (inside) address[element] = sums[element];
        if (!inside) sums[element] = 0.0f;
      }
    }
    return make_uint4(
        __float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]), __float_as_uint(sums[3]));
  }
};

// Adds the gradients to a tile of the rows, and takes no Gram of it.
__device__ __forceinline__ void update_tile(
    const Rows& rows, const UpdateSource& source, const Tile& tile, int shift) {
  const Window window{tile.start, tile.start + tile.length, shift >= 0};
  const int64_t origin = grid_start<4>(tile.start, shift);
  for (int row = 0; row < rows.count; ++row) {
    if (source.incoming.first[row] == source.incoming.first[row + 1]) continue;
    for (int64_t position = origin + int64_t{threadIdx.x} * 4; position < window.end;
         position += int64_t{blockDim.x} * 4) {
      source.load<4>(static_cast<const char*>(rows.data[row]), row, position, window);
    }
  }
}

}  // namespace bucketmoo

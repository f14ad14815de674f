// What the kernels share: the tensor-core instruction, 16-byte loads, conversions, and how tiles are dealt to blocks.
#pragma once

#include "launch.h"
#include "runtime.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace bucketmoo {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kVectorBytes = 16;

// The tests' emulator has its own of these.
#ifdef __CUDACC__

// c += a b of 16 x 16 by 16 x 8 products, float32 sums.
__device__ __forceinline__ void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
__device__ __forceinline__ float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }

#endif

struct BFloat16Format {
  static constexpr int kBytes = 2;
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_bfloat16(c, a, b);
  }
};

struct Float16Format {
  static constexpr int kBytes = 2;
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_float16(c, a, b);
  }
};

struct Float32Format {
  static constexpr int kBytes = 4;
  static constexpr Dtype kDtype = Dtype::kFloat32;
};

struct Float64Format {
  static constexpr int kBytes = 8;
  static constexpr Dtype kDtype = Dtype::kFloat64;
};

// The elements [begin, end) that a load may touch, and whether whole vectors of them may be loaded at once.
struct Window {
  int64_t begin;
  int64_t end;
  bool vectors;
};

// How far past a 16-byte boundary the rows lie, in elements; -1 where they differ. Vectors are laid on that grid.
inline int common_shift(const Rows& rows) {
  const auto past = [&](int row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(rows.data[row]) % kVectorBytes);
  };
  for (int row = 1; row < rows.count; ++row) {
    if (past(row) != past(0)) return -1;
  }
  return past(0) / size_of(rows.dtype);
}

// The start of the vector which the first element of a tile lies in; it may lie before the row, and is then not read.
template <int kBytes>
__device__ __forceinline__ int64_t grid_start(int64_t start, int shift) {
  constexpr int kElements = kVectorBytes / kBytes;
  return shift < 0 ? start : start - (start + shift) % kElements;
}

// Loads the vector of elements that begins at `position`; what lies outside of the window is 0.
template <int kBytes>
__device__ __forceinline__ uint4 load_vector(const char* row, int64_t position, Window window) {
  constexpr int kElements = kVectorBytes / kBytes;
  const char* address = row + position * kBytes;
  if (window.vectors && position >= window.begin && position + kElements <= window.end) {
    return *reinterpret_cast<const uint4*>(address);
  }
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int element = 0; element < kElements; ++element) {
    if (position + element < window.begin || position + element >= window.end) continue;
    if constexpr (kBytes == 2) {
      words[element / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(address)[element]} << (element % 2 * 16);
    } else if constexpr (kBytes == 4) {
      words[element] = reinterpret_cast<const uint32_t*>(address)[element];
    } else {
      const uint64_t bits = reinterpret_cast<const uint64_t*>(address)[element];
      words[2 * element] = static_cast<uint32_t>(bits);
      words[2 * element + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint32_t word(const uint4& vector, int index) {
  return index == 0 ? vector.x : index == 1 ? vector.y : index == 2 ? vector.z : vector.w;
}

__device__ __forceinline__ double double_of(uint32_t low, uint32_t high) {
  return __longlong_as_double(static_cast<long long>(uint64_t{high} << 32 | low));
}

// The sum over a warp, in a fixed tree, in every lane.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// Blocks are dealt whole ranges of tiles, in order: part p of P has tiles [p T / P, (p + 1) T / P).
__device__ __forceinline__ int64_t part_begin(int64_t part, int64_t parts, int64_t tiles) {
  return part * tiles / parts;
}
__device__ __forceinline__ int64_t part_of(int64_t tile, int64_t parts, int64_t tiles) {
  return ((tile + 1) * parts - 1) / tiles;
}

}  // namespace bucketmoo

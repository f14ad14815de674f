// The weighted sum of the rows of a tile. Weights are read on the device; a weight of exactly 0 leaves its row unread.
#pragma once

#include "common.cuh"

namespace bucketmoo {

constexpr int kCombineThreads = 256;

// The rows of a cell whose weight is not 0, in shared memory. Indices, as an address that is read from shared memory
// is no longer known to be one of global memory.
template <class Real>
struct Chosen {
  int row[kMaxRows];
  Real weight[kMaxRows];
  int count;
};

// By the first warp; the caller synchronises before and after.
template <class Real>
__device__ __forceinline__ void choose(const Rows& rows, const double* weights, Chosen<Real>& chosen) {
  if (threadIdx.x >= kWarp) return;
  int count = 0;
  for (int base = 0; base < rows.count; base += kWarp) {
    const int row = base + static_cast<int>(threadIdx.x);
    const double weight = row < rows.count ? weights[row] : 0.0;
    const unsigned used = __ballot_sync(kAll, weight != 0.0);
    if (weight != 0.0) {
      const int place = count + __popc(used & ((1u << threadIdx.x) - 1));
      chosen.row[place] = row;
      chosen.weight[place] = static_cast<Real>(weight);
    }
    count += __popc(used);
  }
  if (threadIdx.x == 0) chosen.count = count;
}

template <class Format>
struct Widened {
  using Real = float;
  static constexpr int kElements = kVectorBytes / Format::kBytes;
  static __device__ __forceinline__ float value(const uint4& vector, int element) {
    if constexpr (Format::kBytes == 4) {
      return __uint_as_float(word(vector, element));
    } else {
      const auto bits = static_cast<uint16_t>(word(vector, element / 2) >> (element % 2 * 16));
      return Format::kDtype == Dtype::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
    }
  }
  static __device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
};

template <>
struct Widened<Float64Format> {
  using Real = double;
  static constexpr int kElements = 2;
  static __device__ __forceinline__ double value(const uint4& vector, int element) {
    return double_of(word(vector, 2 * element), word(vector, 2 * element + 1));
  }
  static __device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
};

// Writes the values of a vector that lie in the window, in one or two stores where the address allows.
template <int kElements, class Real>
__device__ __forceinline__ void store_vector(
    void* out, Dtype dtype, int64_t position, Window window, const Real (&values)[kElements]) {
  const bool whole = position >= window.begin && position + kElements <= window.end;
  const int bytes = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  char* address = static_cast<char*>(out) + position * bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
  const auto inside = [&](int element) {
    return position + element >= window.begin && position + element < window.end;
  };
  if (dtype == Dtype::kFloat64) {
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (inside(element)) reinterpret_cast<double*>(address)[element] = static_cast<double>(values[element]);
    }
  } else if (dtype == Dtype::kFloat32) {
    if constexpr (kElements % 4 == 0) {
      if (whole && aligned) {
#pragma unroll
        for (int word = 0; word < kElements / 4; ++word) {
          reinterpret_cast<float4*>(address)[word] = make_float4(
              static_cast<float>(values[4 * word]), static_cast<float>(values[4 * word + 1]),
              static_cast<float>(values[4 * word + 2]), static_cast<float>(values[4 * word + 3]));
        }
        return;
      }
    }
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (inside(element)) reinterpret_cast<float*>(address)[element] = static_cast<float>(values[element]);
    }
  } else {
    uint32_t words[(kElements + 1) / 2] = {};
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      const auto value = static_cast<float>(values[element]);
      const uint16_t bits = dtype == Dtype::kBFloat16 ? to_bfloat16(value) : to_float16(value);
      words[element / 2] |= uint32_t{bits} << (element % 2 * 16);
    }
    if constexpr (kElements == 8) {
      if (whole && aligned) {
        *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
      }
    }
    if constexpr (kElements == 4) {
      if (whole && reinterpret_cast<uintptr_t>(address) % 8 == 0) {
        *reinterpret_cast<uint2*>(address) = make_uint2(words[0], words[1]);
        return;
      }
    }
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (inside(element)) {
        reinterpret_cast<uint16_t*>(address)[element] =
            static_cast<uint16_t>(words[element / 2] >> (element % 2 * 16));
      }
    }
  }
}

// A thread reads its elements of all rows before it writes them, so that `out` may be a row. Four rows are on their way
// at a time.
template <class Format>
__device__ __forceinline__ void combine_tile(
    const Rows& rows, const Chosen<typename Widened<Format>::Real>& chosen, const Tile& tile, int shift, void* out,
    Dtype out_dtype) {
  using Wide = Widened<Format>;
  using Real = typename Wide::Real;
  constexpr int kElements = Wide::kElements;
  constexpr int kAhead = 4;
  const Window window{tile.start, tile.start + tile.length, shift >= 0};
  const int64_t origin = grid_start<Format::kBytes>(tile.start, shift);
  for (int64_t position = origin + int64_t{threadIdx.x} * kElements; position < window.end;
       position += int64_t{blockDim.x} * kElements) {
    Real sums[kElements] = {};
    const auto load = [&](int place) {
      const auto* data = static_cast<const char*>(rows.data[chosen.row[place]]);
      return load_vector<Format::kBytes>(data, position, window);
    };
    int place = 0;
    for (; place + kAhead <= chosen.count; place += kAhead) {
      uint4 vector[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) vector[ahead] = load(place + ahead);
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
        for (int element = 0; element < kElements; ++element) {
          sums[element] = Wide::fused(chosen.weight[place + ahead], Wide::value(vector[ahead], element), sums[element]);
        }
      }
    }
    for (; place < chosen.count; ++place) {
      const uint4 vector = load(place);
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
        sums[element] = Wide::fused(chosen.weight[place], Wide::value(vector, element), sums[element]);
      }
    }
    store_vector<kElements>(out, out_dtype, position, window, sums);
  }
}

// All tiles: `parts` ranges, as `gram_tiles` deals them, in step, each from its end if `backward`; then what lies
// outside of the segments, which becomes 0.
template <class Format>
__device__ __forceinline__ void combine_tiles(
    const Rows& rows, const double* weights, const Tiles& tiles, int shift, void* out, Dtype out_dtype, int64_t parts,
    bool backward, char* shared) {
  auto& chosen = *reinterpret_cast<Chosen<typename Widened<Format>::Real>*>(shared);
  const int64_t depth = parts == 0 ? 0 : (tiles.inside + parts - 1) / parts;
  const int64_t steps = depth * parts;
  int64_t cell = -2;
  for (int64_t step = blockIdx.x; step < steps + tiles.outside; step += gridDim.x) {
    int64_t index = tiles.inside + step - steps;
    if (step < steps) {
      const int64_t begin = part_begin(step % parts, parts, tiles.inside);
      const int64_t end = part_begin(step % parts + 1, parts, tiles.inside);
      index = backward ? end - 1 - step / parts : begin + step / parts;
      if (index < begin || index >= end) continue;
    }
    const Tile tile = tiles.data[index];
    if (tile.cell != cell) {
      cell = tile.cell;
      __syncthreads();
      if (cell >= 0) {
        choose(rows, weights + cell * rows.count, chosen);
      } else if (threadIdx.x == 0) {
        chosen.count = 0;
      }
      __syncthreads();
    }
    combine_tile<Format>(rows, chosen, tile, shift, out, out_dtype);
  }
}

}  // namespace bucketmoo

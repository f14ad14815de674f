// Partial Grams of tiles, in one of three ways by dtype and K; each sums every pair of rows in the same order wherever
// the pair stands, so that a permutation of the rows permutes the Gram to the bit:
//
//   TensorGram  bf16 and fp16: products on the tensor cores, straight from registers
//   ChainGram   float32, K <= 8: unrolled multiply-adds, straight from registers
//   StagedGram  float32 above, and float64: 4 x 4 tiles of pairs, from shared memory
//
// Products of bf16 and fp16 are exact in float32. No TF32. Float32 sums are short, then go to float64 (kChain).
// Every block takes a range of tiles and writes one partial Gram for each of the tiles' cells that it meets. As tiles
// are sorted by cell, (part, cell) is a staircase, and part + cell names a partial that nobody else writes: the sum
// of a cell's partials (`add_partials`) has a fixed order, and no atomics are needed.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace bucketmoo {

// Loads rows as they are. `accumulate.cuh` has the one that adds gradients to them first.
struct PlainSource {
  template <int kBytes>
  __device__ __forceinline__ uint4 load(const char* data, int, int64_t position, Window window) const {
    return load_vector<kBytes>(data, position, window);
  }
};

// What one warp of a register kernel does with a tile: it takes every warps-th step of kUnroll vectors a lane and row,
// and loads the next while it multiplies the last.
template <class Gram, class Source>
__device__ __forceinline__ void walk(
    const Gram& self, const Rows& rows, const Source& source, const Tile& tile, int shift, double* sums) {
  const int64_t origin = grid_start<Gram::kBytes>(tile.start, shift);
  const Window window{tile.start, tile.start + tile.length, shift >= 0};
  const int64_t stride = int64_t{self.step_elements()} * (blockDim.x / kWarp);
  uint4 next[Gram::kUnroll][Gram::kLoads];
  const auto fetch = [&](int64_t start) {
#pragma unroll
    for (int unroll = 0; unroll < Gram::kUnroll; ++unroll) {
#pragma unroll
      for (int load = 0; load < Gram::kLoads; ++load) {
        next[unroll][load] = make_uint4(0, 0, 0, 0);
        const int row = self.row_of(load);
        if (row >= rows.count) continue;
        const auto* data = static_cast<const char*>(rows.data[row]);
        const int64_t position = start + self.lane_offset() + unroll * self.unroll_elements();
        next[unroll][load] = source.template load<Gram::kBytes>(data, row, position, window);
      }
    }
  };
  int64_t start = origin + int64_t{self.step_elements()} * (threadIdx.x / kWarp);
  if (start >= window.end) return;
  typename Gram::Sums chain{};
  int steps = 0;
  fetch(start);
  for (; start < window.end; start += stride) {
    uint4 current[Gram::kUnroll][Gram::kLoads];
#pragma unroll
    for (int unroll = 0; unroll < Gram::kUnroll; ++unroll) {
#pragma unroll
      for (int load = 0; load < Gram::kLoads; ++load) current[unroll][load] = next[unroll][load];
    }
    if (start + stride < window.end) fetch(start + stride);
#pragma unroll
    for (int unroll = 0; unroll < Gram::kUnroll; ++unroll) self.multiply(chain, current[unroll]);
    if (++steps == Gram::kSteps || start + stride >= window.end) {
      steps = 0;
#pragma unroll
      for (int index = 0; index < Gram::kSums; ++index) {
        sums[index * blockDim.x] += static_cast<double>(chain.value[index]);
        chain.value[index] = 0.0f;
      }
    }
  }
}

// bf16 or fp16, kGroups groups of 8 rows. A lane's 16-byte vector of row g serves as both operands of two
// multiplications: an inner product does not mind the order of its terms, so fragments need no shuffling. With K <= 4
// the 8 rows of the group hold K rows at 8 / K places of the tile at once (`fold_`); the products across places are
// thrown away.
template <class Format, int kGroups>
class TensorGram {
 public:
  static constexpr int kBytes = 2;
  using Elements = Format;
  static constexpr int kThreads = 256;  // or fewer, where shared memory is short
  static constexpr int kResident = kGroups == 8 ? 1 : 2;  // blocks a multiprocessor; leaves 128 registers a thread
  static constexpr int kLoads = kGroups;
  static constexpr int kUnroll = 8 / kGroups;
  // 16 multiplications of 16 terms in float32, whose error each is at most 2^-22 of the sum of magnitudes (the adders
  // truncate): 16 * 2^-22 < 4e-6 of sqrt(G_ii G_jj), by Cauchy and Schwarz, for any number of elements.
  static constexpr int kChain = 16;
  static constexpr int kSteps = kChain / (2 * kUnroll);
  static constexpr int kTiles = kGroups == 1 ? 1 : kGroups / 2 * (kGroups / 2 + 1);
  static constexpr int kSums = kGroups == 1 ? 2 : 4 * kTiles;
  // Of one thread: its sums in float64.
  static constexpr int kThreadBytes = kSums * 8;

  struct Sums {
    float value[kSums];
  };

  __device__ __forceinline__ explicit TensorGram(int count)
      : places_(count == 1 ? 8 : count == 2 ? 4 : count <= 4 ? 2 : 1) {}

  template <class Source>
  __device__ __forceinline__ void add(
      const Rows& rows, const Source& source, const Tile& tile, int shift, char* shared) const {
    walk(*this, rows, source, tile, shift, reinterpret_cast<double*>(shared) + threadIdx.x);
  }

  __device__ __forceinline__ void clear(char* shared) const {
    double* sums = reinterpret_cast<double*>(shared) + threadIdx.x;
    for (int index = 0; index < kSums; ++index) sums[index * blockDim.x] = 0.0;
  }

  // Adds up the warps and places of each pair, in order.
  __device__ __forceinline__ void finish(int count, char* shared, double* partial) const {
    const double* sums = reinterpret_cast<const double*>(shared);
    for (int pair = threadIdx.x; pair < count * count; pair += blockDim.x) {
      const int i = pair / count;
      const int j = pair % count;
      if (i > j) continue;
      double total = 0.0;
      for (int place = 0; place < places_; ++place) {
        const int offset = place * (8 / places_);
        const int slot = slot_of(i + offset, j + offset);
        for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[slot + warp * kWarp];
      }
      partial[pair] = total;
    }
  }

  __device__ __forceinline__ int row_of(int load) const { return load * 8 + lane() / 4 % (8 / places_); }
  __device__ __forceinline__ int step_elements() const { return 32 * places_ * kUnroll; }
  __device__ __forceinline__ int unroll_elements() const { return 32 * places_; }
  __device__ __forceinline__ int lane_offset() const { return lane() / 4 / (8 / places_) * 32 + lane() % 4 * 8; }

  __device__ __forceinline__ void multiply(Sums& chain, const uint4 (&vector)[kLoads]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kGroups == 1) {
        const uint32_t a[4] = {word(vector[0], 2 * half), 0, word(vector[0], 2 * half + 1), 0};
        const uint32_t b[2] = {a[0], a[2]};
        float c[4] = {chain.value[0], chain.value[1], 0.0f, 0.0f};
        Format::multiply(c, a, b);
        chain.value[0] = c[0];
        chain.value[1] = c[1];
      } else {
        int tile = 0;
#pragma unroll
        for (int i = 0; i < kGroups / 2; ++i) {
          const uint4& low = vector[2 * i];
          const uint4& high = vector[2 * i + 1];
          const uint32_t a[4] = {
              word(low, 2 * half), word(high, 2 * half), word(low, 2 * half + 1), word(high, 2 * half + 1)};
#pragma unroll
          for (int j = 2 * i; j < kGroups; ++j, ++tile) {
            const uint32_t b[2] = {word(vector[j], 2 * half), word(vector[j], 2 * half + 1)};
            float(&c)[4] = *reinterpret_cast<float(*)[4]>(&chain.value[4 * tile]);
            Format::multiply(c, a, b);
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

  // Where the sum of rows i <= j of the groups stands: the fragment layout of mma.m16n8k16's result.
  static __device__ __forceinline__ int slot_of(int i, int j) {
    const int upper = i / 16;
    const int tile = upper * (kGroups + 1 - upper) + j / 8 - 2 * upper;
    const int value = 4 * tile + (i % 16 >= 8 ? 2 : 0) + j % 2;
    return value * static_cast<int>(blockDim.x) + i % 8 * 4 + j % 8 / 2;
  }

  int places_;
};

// float32, K <= kRows <= 8: a lane multiplies 4 elements of each row at a time, and each sum takes at most 16 products
// before it goes to float64: |dG_ij| <= 16 * 2^-24 sqrt(G_ii G_jj) < 1e-6.
template <int kRows>
class ChainGram {
 public:
  static constexpr int kBytes = 4;
  using Elements = Float32Format;
  static constexpr int kThreads = 256;  // or fewer, where shared memory is short
  static constexpr int kResident = 2;
  static constexpr int kLoads = kRows;
  static constexpr int kUnroll = kRows == 8 ? 1 : kRows == 4 ? 2 : 4;
  static constexpr int kChain = 16;
  static constexpr int kSteps = kChain / (4 * kUnroll);
  static constexpr int kSums = kRows * (kRows + 1) / 2;
  // Of one thread: its sums in float64.
  static constexpr int kThreadBytes = kSums * 8;

  struct Sums {
    float value[kSums];
  };

  __device__ __forceinline__ explicit ChainGram(int) {}

  template <class Source>
  __device__ __forceinline__ void add(
      const Rows& rows, const Source& source, const Tile& tile, int shift, char* shared) const {
    walk(*this, rows, source, tile, shift, reinterpret_cast<double*>(shared) + threadIdx.x);
  }

  __device__ __forceinline__ void clear(char* shared) const {
    double* sums = reinterpret_cast<double*>(shared) + threadIdx.x;
    for (int index = 0; index < kSums; ++index) sums[index * blockDim.x] = 0.0;
  }

  // A warp adds up the threads' sums of a pair, in a fixed tree.
  __device__ __forceinline__ void finish(int count, char* shared, double* partial) const {
    const double* sums = reinterpret_cast<const double*>(shared);
    for (int pair = threadIdx.x / kWarp; pair < count * count; pair += blockDim.x / kWarp) {
      const int i = pair / count;
      const int j = pair % count;
      if (i > j) continue;
      double total = 0.0;
      for (unsigned thread = threadIdx.x % kWarp; thread < blockDim.x; thread += kWarp) {
        total += sums[(j * (j + 1) / 2 + i) * blockDim.x + thread];
      }
      total = warp_sum(total);
      if (threadIdx.x % kWarp == 0) partial[pair] = total;
    }
  }

  __device__ __forceinline__ int row_of(int load) const { return load; }
  __device__ __forceinline__ int step_elements() const { return 4 * kWarp * kUnroll; }
  __device__ __forceinline__ int unroll_elements() const { return 4 * kWarp; }
  __device__ __forceinline__ int lane_offset() const { return threadIdx.x % kWarp * 4; }

  __device__ __forceinline__ void multiply(Sums& chain, const uint4 (&vector)[kLoads]) const {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
#pragma unroll
        for (int i = 0; i <= j; ++i) {
          float& sum = chain.value[j * (j + 1) / 2 + i];
          sum = fmaf(__uint_as_float(word(vector[i], element)), __uint_as_float(word(vector[j], element)), sum);
        }
      }
    }
  }
};

// float32 or float64, any K. A stage of every row lies in shared memory; a thread owns the 4 x 4
// pairs of rows {i, i + n, i + 2n, i + 3n} and {j, j + n, ...}, n = ceil(K / 4), in every `slices`-th vector.
// With rows dealt so, the lanes of a warp read neighbouring rows, which the padded stride puts into different banks.
template <class T>
class StagedGram {
 public:
  static constexpr int kBytes = sizeof(T);
  using Elements = std::conditional_t<sizeof(T) == 4, Float32Format, Float64Format>;
  static constexpr int kThreads = 288;  // K = 64 has 136 tiles of pairs: two slices fill 272 threads
  static constexpr int kResident = 1;
  static constexpr int kElements = kVectorBytes / kBytes;
  // Sums are added up across the slices in the memory of the stage, which is no larger.
  static constexpr int kThreadBytes = 16 * 8;
  static_assert(kThreads * kThreadBytes >= kMaxRows * (kWarp + 1) * kVectorBytes, "the stage fits");
  // float32: four vectors, that is 16 products, before a sum goes to float64.
  static constexpr int kSteps = 4;

  __device__ __forceinline__ explicit StagedGram(int count)
      : groups_((count + 3) / 4), vectors_(kWarp * (kMaxRows / 4 / groups_)) {
    const int tiles = groups_ * (groups_ + 1) / 2;
    slices_ = kThreads / tiles;
    slice_ = threadIdx.x / tiles;
    int tile = threadIdx.x % tiles;
    first_ = 0;
    while (tile >= groups_ - first_) tile -= groups_ - first_++;
    second_ = first_ + tile;
  }

  template <class Source>
  __device__ __forceinline__ void add(
      const Rows& rows, const Source& source, const Tile& tile, int shift, char* shared) {
    const Window window{tile.start, tile.start + tile.length, shift >= 0};
    uint4* stage = reinterpret_cast<uint4*>(shared);
    const int lane = threadIdx.x % kWarp;
    for (int64_t start = grid_start<kBytes>(tile.start, shift); start < window.end; start += vectors_ * kElements) {
      __syncthreads();
      for (int row = threadIdx.x / kWarp; row < 4 * groups_; row += kThreads / kWarp) {
#pragma unroll 2
        for (int vector = lane; vector < vectors_; vector += kWarp) {
          const int64_t position = start + vector * kElements;
          uint4 loaded = make_uint4(0, 0, 0, 0);
          if (row < rows.count && position < window.end) {
            loaded = source.template load<kBytes>(static_cast<const char*>(rows.data[row]), row, position, window);
          }
          stage[row * (vectors_ + 1) + vector] = loaded;
        }
      }
      __syncthreads();
      if (slice_ < slices_) multiply(stage);
    }
  }

  __device__ __forceinline__ void clear(char*) {
#pragma unroll
    for (int index = 0; index < 16; ++index) total_[index] = 0.0;
  }

  __device__ __forceinline__ void finish(int count, char* shared, double* partial) const {
    double* sums = reinterpret_cast<double*>(shared);
#pragma unroll
    for (int index = 0; index < 16; ++index) sums[index * kThreads + threadIdx.x] = total_[index];
    __syncthreads();
    const int tiles = groups_ * (groups_ + 1) / 2;
    if (slice_ != 0) return;
#pragma unroll 1
    for (int index = 0; index < 16; ++index) {
      const int a = first_ + index / 4 * groups_;
      const int b = second_ + index % 4 * groups_;
      if (a >= count || b >= count || (first_ == second_ && a > b)) continue;
      double total = 0.0;
      for (int slice = 0; slice < slices_; ++slice) total += sums[index * kThreads + slice * tiles + threadIdx.x];
      partial[a < b ? a * count + b : b * count + a] = total;
    }
  }

 private:
  __device__ __forceinline__ void multiply(const uint4* stage) {
    T chain[16] = {};
    int steps = 0;
    for (int vector = slice_; vector < vectors_; vector += slices_) {
      uint4 a[4];
      uint4 b[4];
#pragma unroll
      for (int index = 0; index < 4; ++index) {
        a[index] = stage[(first_ + index * groups_) * (vectors_ + 1) + vector];
        b[index] = stage[(second_ + index * groups_) * (vectors_ + 1) + vector];
      }
#pragma unroll
      for (int element = 0; element < kElements; ++element) {
#pragma unroll
        for (int index = 0; index < 16; ++index) {
          chain[index] = fused(value(a[index / 4], element), value(b[index % 4], element), chain[index]);
        }
      }
      if (kBytes == 4 && ++steps == kSteps) {
        steps = 0;
        flush(chain);
      }
    }
    flush(chain);
  }

  __device__ __forceinline__ void flush(T (&chain)[16]) {
#pragma unroll
    for (int index = 0; index < 16; ++index) {
      total_[index] += static_cast<double>(chain[index]);
      chain[index] = 0;
    }
  }

  static __device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
  static __device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

  static __device__ __forceinline__ T value(const uint4& vector, int element) {
    if constexpr (kBytes == 4) {
      return __uint_as_float(word(vector, element));
    } else {
      return double_of(word(vector, 2 * element), word(vector, 2 * element + 1));
    }
  }

  double total_[16];
  int groups_;
  int vectors_;  // of each row in a stage
  int slices_;
  int slice_;
  int first_;
  int second_;
};

// The tiles of this block of threads, one partial Gram for each of their cells.
template <class Gram, class Source>
__device__ __forceinline__ void gram_tiles(
    const Rows& rows, const Source& source, const Tiles& tiles, int shift, double* partials, char* shared) {
  Gram gram(rows.count);
  const int64_t part = blockIdx.x;
  const int64_t end = part_begin(part + 1, gridDim.x, tiles.inside);
  int64_t cell = -1;
  const auto finish = [&] {
    __syncthreads();
    gram.finish(rows.count, shared, partials + (part + cell) * rows.count * rows.count);
    __syncthreads();
  };
  for (int64_t index = part_begin(part, gridDim.x, tiles.inside); index < end; ++index) {
    const Tile tile = tiles.data[index];
    if (tile.cell != cell) {
      if (cell >= 0) finish();
      cell = tile.cell;
      gram.clear(shared);
    }
    gram.add(rows, source, tile, shift, shared);
  }
  if (cell >= 0) finish();
}

// Adds up the partials of every cell, a warp a pair, in a fixed order, and mirrors them.
__device__ __forceinline__ void add_partials(
    const double* partials, const Tiles& tiles, int64_t parts, int count, double* gram) {
  const int64_t pairs = int64_t{count} * count;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  const int64_t first = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  for (int64_t item = first; item < tiles.cells * pairs; item += warps) {
    const int64_t cell = item / pairs;
    const int i = static_cast<int>(item % pairs) / count;
    const int j = static_cast<int>(item % pairs) % count;
    if (i > j) continue;
    double total = 0.0;
    const int64_t begin = tiles.first[cell];
    const int64_t end = tiles.first[cell + 1];
    if (begin < end) {
      const int64_t last = part_of(end - 1, parts, tiles.inside);
      for (int64_t part = part_of(begin, parts, tiles.inside) + threadIdx.x % kWarp; part <= last; part += kWarp) {
        total += partials[(part + cell) * pairs + i * count + j];
      }
    }
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) {
      gram[cell * pairs + i * count + j] = total;
      gram[cell * pairs + j * count + i] = total;
    }
  }
}

}  // namespace bucketmoo

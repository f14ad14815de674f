// What the vectorised code offers to the ops, once for each instruction set. Knows pointers and counts, no tensors.
#pragma once

#include <cstdint>

namespace bucketmoo {

enum class Dtype { float32, bfloat16, float16, float64 };

// Columns that one call of `gram` takes at most: sums of that many products leave the kernel in float64.
constexpr int64_t kPiece = 4096;
constexpr int kMaxRows = 64;

// Static: each instruction set keeps its own copy, which the linker must not give to another.
static constexpr int pair_count(int rows) { return rows * (rows + 1) / 2; }
static constexpr int pair_index(int i, int j) { return i * (i + 1) / 2 + j; }  // i >= j

struct Kernels {
  const char* name;

  // Adds to pairs[pair_index(i, j)] the inner product of rows i and j over the columns [begin, begin + count), and lets
  // the memory fetch those from `next` on, which the caller will ask for next.
  void (*gram)(const void* const* rows, Dtype dtype, int num_rows, int64_t begin, int64_t count, int64_t next,
               double* pairs);

  // row = fma(scale, incoming, row), or scale * incoming where the row is fresh.
  void (*accumulate)(float* row, const void* incoming, Dtype dtype, float scale, bool fresh, int64_t begin,
                     int64_t count);

  // out = the sum of weights[k] * rows[k] in float64, rounded once to out's dtype (16-bit to 16-bit: in float32); zeros
  // for no rows.
  void (*combine)(const void* const* rows, Dtype dtype, const double* weights, int num_rows, int64_t begin,
                  int64_t count, void* out, Dtype out_dtype);
};

// The kernels of each instruction set that this library was built with; null where the machine lacks it.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace bucketmoo

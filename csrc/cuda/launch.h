// The plain interface of the CUDA kernels: addresses, sizes and a stream, no framework. `bindings.cpp` calls it with
// tensors, the tests' emulator with arrays of the host. What the kernels compute stands in bucketmoo_ds/ops.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace bucketmoo {

constexpr int kMaxRows = 64;
// Rows of incoming gradients that one launch takes as kernel parameters.
constexpr int kMaxIncoming = 64;

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

inline int size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// K rows that are never stacked: their addresses travel as kernel parameters, without a copy to the device.
struct Rows {
  const void* data[kMaxRows];
  int32_t count;
  Dtype dtype;
};

// A stretch of elements of one cell; a cell of -1 lies outside of all segments.
struct Tile {
  int64_t start;
  int64_t length;
  int64_t cell;
};

// The tiles of a shard, on the device, sorted by cell; those outside of all segments stand at the end.
struct Tiles {
  const Tile* data;
  const int64_t* first;  // [cells + 1]: where each cell's tiles begin
  int64_t inside;        // how many lie in a segment
  int64_t outside;       // how many do not
  int64_t cells;
};

// Gradients that are added to the rows: sorted by row, those of row k are first[k] to first[k + 1].
struct Incoming {
  const void* data[kMaxIncoming];
  float scale[kMaxIncoming];
  int32_t first[kMaxRows + 1];
  uint64_t fresh;  // bit k: row k is overwritten by its first gradient
  Dtype dtype;
};

// Each returns how many partial Grams [K, K] float64 of workspace its launch needs on the current device.
int64_t gram_slots(const Rows& rows, const Tiles& tiles);
int64_t accumulate_slots(const Rows& rows, const Tiles& tiles);
// 0: rows do not fit into the device's L2 cache, and one launch would gain nothing over three.
int64_t resolve_slots(const Rows& rows, const Tiles& tiles, int64_t elements);

// The device does not run all blocks of a cooperative launch at once; nothing has been launched.
struct NotTogether : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// All raise std::runtime_error with the kernel's name and the driver's message.
void gram(const Rows& rows, const Tiles& tiles, double* partials, double* gram, void* stream);
// `last`: further gradients follow in another launch if false, and no Gram is taken yet.
void accumulate_gram(
    const Rows& rows, const Incoming& incoming, const Tiles& tiles, bool last, double* partials, double* gram,
    void* stream);
void min_norm(
    const double* gram, const bool* mask, int64_t blocks, int rows, double max_weight, double* weights, bool* finite,
    void* stream);
// `backward`: the tiles that `gram` has read last come first, as they still lie in the L2 cache.
void combine(
    const Rows& rows, const double* weights, const Tiles& tiles, void* out, Dtype out_dtype, bool backward,
    void* stream);
// One cooperative launch, or NotTogether.
void resolve(
    const Rows& rows, const Tiles& tiles, const bool* mask, double max_weight, double* partials, double* gram,
    double* weights, bool* finite, void* out, Dtype out_dtype, void* stream);

}  // namespace bucketmoo

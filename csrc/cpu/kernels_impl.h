// The kernels of one instruction set: included once by each of kernels_{baseline,avx2,avx512}.cpp, with its flags.
//
// Gram. Chunks of columns of the rows lie in the cache; pairs of rows are taken in tiles of 4 x kTileColumns
// accumulators that stay in registers. Two ways of adding up, by what memory leaves time for:
//   wide    products and sums in float64: float64 and float16 rows, and float32 ones up to kWideRows
//   narrow  each lane adds up a chain of products by fused multiply-adds in float32, the lanes' chains are added as a
//           tree in float32, and that to a float64 sum. One such sum is rounded chain + log2(kLanes) times, so that
//           |dG_ij| <= (chain + log2(kLanes)) 2^-24 sum |a_i b_j|, and that sum is at most sqrt(G_ii G_jj), whatever
//           the length: 9.6e-7 for float32 rows, 1.9e-6 for bfloat16 ones, whose products are exact. Errors of float32
//           rows have either sign and average out. Squares of 16-bit numbers do not round both ways equally often (odd
//           ones are 1 modulo 8): 1.5e-8 of a bfloat16 row's G_ii remains at any length. Of a float16 row's it would be
//           4.7e-8, and no training here waits for float16 Grams: they are wide. Products beyond float32's range (about
//           1e-38 to 3e38) are lost.
// A pair is added up in one order that does not depend on its place in a tile: a permutation of the rows permutes the
// Gram to the bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace bucketmoo {
namespace {

constexpr int kGroup = 4;         // rows of a tile
constexpr int kWideRows = 16;     // more float32 rows than that would wait for float64 arithmetic, not for memory
constexpr int kDirectRows = 8;    // more bfloat16 rows than that are converted once, not at each load
constexpr int kUnroll = 4;        // rows that `combine` reads at a time

constexpr int log2_of(int value) { return value == 1 ? 0 : 1 + log2_of(value / 2); }

template <class T>
using VectorOf = decltype(load(static_cast<const T*>(nullptr)));
template <class T>
constexpr bool kIsWide = std::is_same_v<VectorOf<T>, DoubleVector>;
template <class T>
constexpr int kVectorLanes = kIsWide<T> ? kLanes / 2 : kLanes;

// Products that a lane adds up before they go to the totals: as many as the bound allows in float32.
template <class T, class Row>
constexpr int64_t kChain = kIsWide<T> ? kPiece : (std::is_same_v<Row, BFloat16> ? 32 : 16) - log2_of(kLanes);

// Keeps the compiler from loading a value again for each of its uses: loads, not arithmetic, would set the pace.
template <class Vector>
inline Vector in_register(Vector value) {
#if defined(__AVX2__)
  asm("" : "+v"(value));
#endif
  return value;
}

// The inner products of a tile: Rows x Columns pairs; where Triangle, of one group with itself and only i >= j.
template <class T, int Rows, int Columns, bool Triangle>
struct Tile {
  using Vector = VectorOf<T>;
  static constexpr int lanes = kVectorLanes<T>;
  static constexpr int num_pairs = Triangle ? pair_count(Rows) : Rows * Columns;
  static constexpr int num_sums = (num_pairs + kFold - 1) / kFold * kFold;

  static constexpr bool skips(int i, int j) { return Triangle && j > i; }
  static constexpr int place(int i, int j) { return Triangle ? pair_index(i, j) : i * Columns + j; }

  // Adds the products over `vectors` vectors of columns to totals.
  static void run(const T* const* left, const T* const* right, int64_t vectors, int64_t chain, double* totals) {
    for (int64_t first = 0; first < vectors; first += chain) {
      const int64_t begin = first * lanes, end = std::min(first + chain, vectors) * lanes;
      Vector sum[num_sums];
#pragma GCC unroll 16
      for (int pair = 0; pair < num_sums; ++pair) sum[pair] = Vector{};
      for (int64_t at = begin; at < end; at += lanes) {
        Vector a[Rows];
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) a[i] = in_register(load(left[i] + at));
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) {
          const Vector b = Triangle ? a[j] : in_register(load(right[j] + at));
#pragma GCC unroll 4
          for (int i = 0; i < Rows; ++i)
            if (!skips(i, j)) sum[place(i, j)] += a[i] * b;
        }
      }
#pragma GCC unroll 4
      for (int pair = 0; pair < num_sums; pair += kFold) add_folded(sum + pair, totals + pair);
    }
  }
};

template <class T, int Rows, int Columns, bool Triangle>
void tile(const T* const* rows, int i0, int j0, int64_t vectors, int64_t chain, double* pairs) {
  using Sums = Tile<T, Rows, Columns, Triangle>;
  alignas(64) double totals[Sums::num_sums] = {};
  Sums::run(rows + i0, rows + j0, vectors, chain, totals);
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Columns; ++j)
      if (!Sums::skips(i, j)) pairs[pair_index(i0 + i, j0 + j)] += totals[Sums::place(i, j)];
}

// The columns after a chunk, fetched into the cache a few rows with every tile: memory and arithmetic overlap. They may
// lie beyond the end of a row: a prefetch touches nothing.
class Ahead {
 public:
  Ahead(const void* const* rows, int num_rows, int64_t begin, int64_t bytes)
      : rows_(rows), num_rows_(num_rows), begin_(begin), bytes_(bytes) {
    const int groups = (num_rows + kGroup - 1) / kGroup;
    const int tiles = groups + groups * (groups - 1) / 2 * (kGroup / kTileColumns);
    rows_a_tile_ = (num_rows + tiles - 1) / tiles;
  }

  void fetch_some() {
    const int end = std::min(next_ + rows_a_tile_, num_rows_);
    for (; next_ < end; ++next_) {
      const char* from = static_cast<const char*>(rows_[next_]) + begin_;
      for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

 private:
  const void* const* rows_;
  int num_rows_, rows_a_tile_, next_ = 0;
  int64_t begin_, bytes_;
};

template <class T, int Rows>
void group_with_others(const T* const* rows, int i0, int64_t vectors, int64_t chain, Ahead& ahead, double* pairs) {
  // Groups before this one are full: kGroup is a multiple of kTileColumns.
  for (int j0 = 0; j0 < i0; j0 += kTileColumns) {
    ahead.fetch_some();
    tile<T, Rows, kTileColumns, false>(rows, i0, j0, vectors, chain, pairs);
  }
  ahead.fetch_some();
  tile<T, Rows, Rows, true>(rows, i0, i0, vectors, chain, pairs);
}

template <class T>
void all_pairs(const T* const* rows, int num_rows, int64_t vectors, int64_t chain, Ahead ahead,
               double* pairs) {
  static_assert(kGroup % kTileColumns == 0);
  for (int i0 = 0; i0 < num_rows; i0 += kGroup) {
    switch (std::min(kGroup, num_rows - i0)) {
      case 4: group_with_others<T, 4>(rows, i0, vectors, chain, ahead, pairs); break;
      case 3: group_with_others<T, 3>(rows, i0, vectors, chain, ahead, pairs); break;
      case 2: group_with_others<T, 2>(rows, i0, vectors, chain, ahead, pairs); break;
      default: group_with_others<T, 1>(rows, i0, vectors, chain, ahead, pairs);
    }
  }
}

constexpr int64_t kChunkBytes = 48 << 10;  // of the rows of a chunk: some fits the first cache, all the second

// Whole chains, so that as few as possible are short.
template <class T>
int64_t chunk_columns(int num_rows, int64_t chain) {
  const int64_t step = (kIsWide<T> ? 16 : chain) * kVectorLanes<T>;
  const int64_t fits = kChunkBytes / (num_rows * static_cast<int64_t>(sizeof(T)));
  return std::clamp(fits, step, kPiece / 4) / step * step;
}

// Copies kLanes elements of a row as T.
template <class Row, class T>
inline void convert(const Row* from, T* to) {
  if constexpr (std::is_same_v<Row, T>) {
    std::copy(from, from + kLanes, to);
  } else if constexpr (std::is_same_v<T, WideFloat>) {
    store(&to->value, load(from));
  } else {
    store(to, load(from));
  }
}

// Copies `count` columns as T; the last vector is filled up with zeros, which add nothing.
template <class T, class Row>
void stage(const Row* from, int64_t count, T* to) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) convert(from + at, to + at);
  if (whole < count) {
    Row rest[kLanes] = {};
    std::copy(from + whole, from + count, rest);
    convert(rest, to + whole);
  }
}

// Takes the rows' columns as T: as they are, or 16-bit ones as float32, where each is used in several tiles.
template <class T, class Row>
void gram_of(const void* const* rows, int num_rows, int64_t begin, int64_t count, int64_t next, double* pairs) {
  constexpr int64_t chain = kChain<T, Row>;
  const int64_t columns = chunk_columns<T>(num_rows, chain);
  alignas(64) T staged[std::max<int64_t>(kChunkBytes / sizeof(T), kMaxRows * 32 * kVectorLanes<T>)];
  const T* chunk[kMaxRows];
  for (int64_t done = 0; done < count; done += columns) {
    const int64_t here = std::min(columns, count - done);
    for (int row = 0; row < num_rows; ++row) {
      const Row* from = static_cast<const Row*>(rows[row]) + begin + done;
      if constexpr (std::is_same_v<T, Row>) {
        if (here % kLanes == 0) {
          chunk[row] = from;
          continue;
        }
      }
      T* to = staged + row * columns;
      stage(from, here, to);
      chunk[row] = to;
    }
    const int64_t ahead_begin = done + columns < count ? begin + done + columns : next;
    const Ahead ahead(rows, num_rows, ahead_begin * sizeof(Row), columns * sizeof(Row));
    all_pairs<T>(chunk, num_rows, (here + kVectorLanes<T> - 1) / kVectorLanes<T>, chain, ahead, pairs);
  }
}

void gram(const void* const* rows, Dtype dtype, int num_rows, int64_t begin, int64_t count, int64_t next,
          double* pairs) {
  switch (dtype) {
    case Dtype::float64: return gram_of<double, double>(rows, num_rows, begin, count, next, pairs);
    case Dtype::float32:
      if (num_rows <= kWideRows) return gram_of<WideFloat, WideFloat>(rows, num_rows, begin, count, next, pairs);
      return gram_of<float, float>(rows, num_rows, begin, count, next, pairs);
    case Dtype::bfloat16:
      if (num_rows <= kDirectRows) return gram_of<BFloat16, BFloat16>(rows, num_rows, begin, count, next, pairs);
      return gram_of<float, BFloat16>(rows, num_rows, begin, count, next, pairs);
    case Dtype::float16: return gram_of<WideFloat, Float16>(rows, num_rows, begin, count, next, pairs);
  }
}

inline FloatVector multiply_add(FloatVector scale, FloatVector x, FloatVector sum) {
#if defined(__FMA__) || defined(__aarch64__)
  return scale * x + sum;  // contracted: one rounding
#else
  return narrow(scale[0] * widen(x) + widen(sum));  // the product is exact
#endif
}

template <class Row>
void accumulate_into(float* row, const Row* incoming, float scale, bool fresh, int64_t count) {
  const FloatVector factor = FloatVector{} + scale;
  for (int64_t at = 0; at < count; at += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - at);
    Row new_part[kLanes] = {};
    float old_part[kLanes] = {};
    const Row* from = incoming + at;
    float* to = row + at;
    if (here < kLanes) {
      std::copy(from, from + here, new_part);
      std::copy(to, to + here, old_part);
      from = new_part;
      to = old_part;
    }
    const FloatVector value = load(from);
    store_unaligned(to, fresh ? factor * value : multiply_add(factor, value, load(to)));
    if (here < kLanes) std::copy(to, to + here, row + at);
  }
}

void accumulate(float* row, const void* incoming, Dtype dtype, float scale, bool fresh, int64_t begin, int64_t count) {
  const auto from = [&]<class Row>(const Row* rows) {
    accumulate_into(row + begin, rows + begin, scale, fresh, count);
  };
  switch (dtype) {
    case Dtype::float32: return from(static_cast<const float*>(incoming));
    case Dtype::bfloat16: return from(static_cast<const BFloat16*>(incoming));
    case Dtype::float16: return from(static_cast<const Float16*>(incoming));
    case Dtype::float64: return;  // the ops hand over no float64 gradients
  }
}

// Sums are float64 and rounded once; 16-bit results of 16-bit rows are summed in float32, whose rounding theirs hides.
template <class Row, class Out>
using SumOf = std::conditional_t<sizeof(Row) == 2 && sizeof(Out) == 2, float, double>;

inline Wide add_weighted(double weight, Wide row, Wide sum) { return weight * row + sum; }
inline FloatVector add_weighted(float weight, FloatVector row, FloatVector sum) { return weight * row + sum; }

template <class Sum, class T>
inline auto load_as(const T* from) {
  if constexpr (std::is_same_v<Sum, float>) {
    return load(from);
  } else {
    return load_wide(from);
  }
}

// Adds Count rows to the sums of a chunk, in the order of the rows.
template <int Count, class Row, class Sum>
inline void add_rows(const Row* const* rows, const double* weights, int64_t vectors, bool first, Sum* sums) {
  using Vector = decltype(load_as<Sum>(sums));
  for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
    Vector sum = first ? Vector{} : load_as<Sum>(sums + at);
#pragma GCC unroll 4
    for (int row = 0; row < Count; ++row)
      sum = add_weighted(static_cast<Sum>(weights[row]), load_as<Sum>(rows[row] + at), sum);
    store(sums + at, sum);
  }
}

constexpr int64_t kCombineColumns = 512;

template <class Row, class Out>
void combine_of(const Row* const* rows, const double* weights, int num_rows, int64_t begin, int64_t count, Out* out) {
  using Sum = SumOf<Row, Out>;
  alignas(64) Sum sums[kCombineColumns];
  alignas(64) Row rest[kUnroll][kCombineColumns];
  alignas(64) Out last[kLanes];
  for (int64_t done = 0; done < count; done += kCombineColumns) {
    const int64_t here = std::min(kCombineColumns, count - done), vectors = (here + kLanes - 1) / kLanes;
    std::fill(sums, sums + vectors * kLanes, Sum{});
    for (int row = 0; row < num_rows; row += kUnroll) {
      const int used = std::min(kUnroll, num_rows - row);
      const Row* from[kUnroll];
      for (int k = 0; k < used; ++k) {
        from[k] = rows[row + k] + begin + done;
        if (here % kLanes != 0) {  // what is read beyond the end must be readable
          std::copy(from[k], from[k] + here, rest[k]);
          std::fill(rest[k] + here, rest[k] + vectors * kLanes, Row{});
          from[k] = rest[k];
        }
      }
      switch (used) {
        case 4: add_rows<4>(from, weights + row, vectors, row == 0, sums); break;
        case 3: add_rows<3>(from, weights + row, vectors, row == 0, sums); break;
        case 2: add_rows<2>(from, weights + row, vectors, row == 0, sums); break;
        default: add_rows<1>(from, weights + row, vectors, row == 0, sums);
      }
    }
    Out* to = out + begin + done;
    const int64_t whole = here / kLanes * kLanes;
    for (int64_t at = 0; at < whole; at += kLanes) store(to + at, load_as<Sum>(sums + at));
    if (whole < here) {
      store(last, load_as<Sum>(sums + whole));
      std::copy(last, last + (here - whole), to + whole);
    }
  }
}

template <class Row>
void combine_rows(const void* const* rows, const double* weights, int num_rows, int64_t begin, int64_t count, void* out,
                  Dtype out_dtype) {
  const Row* typed[kMaxRows];
  for (int row = 0; row < num_rows; ++row) typed[row] = static_cast<const Row*>(rows[row]);
  const auto into = [&]<class Out>(Out* to) { combine_of<Row, Out>(typed, weights, num_rows, begin, count, to); };
  switch (out_dtype) {
    case Dtype::float32: return into(static_cast<float*>(out));
    case Dtype::bfloat16: return into(static_cast<BFloat16*>(out));
    case Dtype::float16: return into(static_cast<Float16*>(out));
    case Dtype::float64: return into(static_cast<double*>(out));
  }
}

void combine(const void* const* rows, Dtype dtype, const double* weights, int num_rows, int64_t begin, int64_t count,
             void* out, Dtype out_dtype) {
  switch (dtype) {
    case Dtype::float32: return combine_rows<float>(rows, weights, num_rows, begin, count, out, out_dtype);
    case Dtype::bfloat16: return combine_rows<BFloat16>(rows, weights, num_rows, begin, count, out, out_dtype);
    case Dtype::float16: return combine_rows<Float16>(rows, weights, num_rows, begin, count, out, out_dtype);
    case Dtype::float64: return combine_rows<double>(rows, weights, num_rows, begin, count, out, out_dtype);
  }
}

}  // namespace
}  // namespace bucketmoo

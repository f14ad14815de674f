// A shard cut into pieces for the kernels, and these dealt into tasks for threads. Knows spans and cells, no tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bucketmoo {

constexpr int64_t kTask = 16384;  // columns that a task takes at least, but the last
constexpr int64_t kNoCell = -1;  // of a piece outside of all segments

struct Piece {
  int64_t begin, count, cell;
};

struct Segments {
  const int64_t* spans;  // [num, 2]: start and length
  const int64_t* cells;
  int64_t num;
  int64_t elements;  // of the shard
};

inline void cut(int64_t begin, int64_t end, int64_t cell, std::vector<Piece>& pieces) {
  for (; begin < end; begin += kPiece) pieces.push_back({begin, std::min(kPiece, end - begin), cell});
}

// The pieces of all segments in ascending order and, where `gaps`, of what lies between them.
inline std::vector<Piece> cut(const Segments& segments, bool gaps) {
  std::vector<Piece> pieces;
  pieces.reserve(segments.num + segments.elements / kPiece);
  int64_t done = 0;
  for (int64_t i = 0; i < segments.num; ++i) {
    const int64_t begin = segments.spans[2 * i], end = begin + segments.spans[2 * i + 1];
    if (gaps) cut(done, begin, kNoCell, pieces);
    cut(begin, end, segments.cells[i], pieces);
    done = end;
  }
  if (gaps) cut(done, segments.elements, kNoCell, pieces);
  return pieces;
}

// Puts pieces in the order of their cells, those of none last.
inline void sort_by_cell(std::vector<Piece>& pieces) {
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return static_cast<uint64_t>(a.cell) < static_cast<uint64_t>(b.cell);
  });
}

// Where each task begins among the pieces, and at the end their number. How many threads there are has no say.
inline std::vector<int64_t> deal(const std::vector<Piece>& pieces) {
  std::vector<int64_t> begins{0};
  int64_t columns = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    columns += pieces[i].count;
    if (columns >= kTask || i + 1 == pieces.size()) {
      begins.push_back(static_cast<int64_t>(i) + 1);
      columns = 0;
    }
  }
  return begins;
}

}  // namespace bucketmoo

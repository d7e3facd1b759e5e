// Patterns: selection where whole groups stay or go, or where each of many small windows keeps its own (plan.h, Pattern).
//
// GROUP. The groups' sums of magnitudes are taken in the order of reference.group_sums and ranked as float64 magnitudes are; the cut is a
// cut of sums. A group is rarely in one piece: its chunks are gathered from the runs of `block` elements that it consists of.
//
// WINDOW. Nothing needs to be known of the rest of the layer, so there is no search. Where the mask is wanted, it is made from the scores
// (loops.h, window_keep).
//
// Masks are made for a tile at a time, a few thousand elements of a layer that contain every window they touch: an integer for each
// element, all ones if it stays and 0 if not, which the loops that apply masks take instead of a bound. They stay in the first-level cache.
// Windows whose elements are far apart (a superblock of size * block elements larger than a tile) are cut across: a tile is then `size`
// runs, the same part of each block.
//
// All of a layer's work, in groups or in tiles, is shared out evenly among its units.
#pragma once

#include <bit>
#include <cmath>
#include <memory>

#include "rank.h"
#include "sum.h"

namespace s2ap {

// The k-th of `of` equal shares of anything.
struct Share {
  int64_t k = 0, of = 1;

  int64_t begin(int64_t count) const { return count * k / of; }
  int64_t end(int64_t count) const { return count * (k + 1) / of; }
};

// n elements of a layer, taken from runs of `run` elements that begin `stride` apart: those from the first-th on.
struct Runs {
  int64_t begin, run, stride, first, n;

  int64_t size() const { return n; }
  int64_t front() const { return begin + first / run * stride + first % run; }  // the index of the first of them
  bool in_one_piece() const { return first % run + n <= run; }

  // f(index, at, count): `count` neighbours from `index` on are the elements from the at-th on.
  template <class F>
  void for_each_piece(const F& f) const {
    int64_t next = begin + first / run * stride, in_run = first % run;
    for (int64_t at = 0, count; at < n; at += count, next += stride, in_run = 0) {
      count = std::min(run - in_run, n - at);
      f(next + in_run, at, count);
    }
  }
};

template <class Bits>
void gather(const Runs& runs, const Bits* x, Bits* out) {
  runs.for_each_piece([&](int64_t index, int64_t at, int64_t count) { std::copy_n(x + index, count, out + at); });
}

// Those elements of x: where they are, or copied to `space` if they are in several pieces.
template <class Bits>
const Bits* collect(const Runs& runs, const Bits* x, Bits* space) {
  if (runs.in_one_piece()) return x + runs.front();
  gather(runs, x, space);
  return space;
}

// Chunk c of a group. The layer has n elements.
inline Runs chunk_of_group(const Pattern& p, int64_t n, int64_t group, int64_t c) {
  return {group * p.block, p.block, p.size * p.block, c * kChunk, std::min(kChunk, n / p.size - c * kChunk)};
}

struct Tile {
  int64_t number;
  Runs elements;  // at most kTile
};

// What a layer of n elements with a pattern is cut into.
class Tiles {
 public:
  Tiles(const Pattern& pattern, int64_t n) : n_(n), period_(pattern.kind == kWindow ? pattern.size * pattern.block : 1) {
    if (period_ <= kTile) {
      whole_ = kTile / period_ * period_;
      count_ = (n + whole_ - 1) / whole_;
    } else {
      block_ = pattern.block;
      width_ = kTile / pattern.size;
      strips_ = (block_ + width_ - 1) / width_;
      count_ = n / period_ * strips_;
    }
  }

  int64_t count() const { return count_; }

  Tile operator[](int64_t number) const {
    if (period_ <= kTile) {
      const int64_t begin = number * whole_, size = std::min(whole_, n_ - begin);
      return {number, {begin, size, 0, 0, size}};
    }
    const int64_t column = number % strips_ * width_, width = std::min(width_, block_ - column);
    return {number, {number / strips_ * period_ + column, width, block_, 0, period_ / block_ * width}};
  }

 private:
  int64_t n_, period_;                          // elements that a tile has whole numbers of
  int64_t whole_ = 0;                           // elements of a tile
  int64_t block_ = 0, width_ = 0, strips_ = 0;  // of those that are cut across
  int64_t count_;
};

// Sums of magnitudes by group, as bits of float64, which rank like any others: every NaN is one and the same.
// read(runs, space) gives the bits of the scores there, in `space` (kChunk elements) or elsewhere.
template <class T, class Read>
void group_sums(const Loops<T>& loop, const Pattern& pattern, int64_t n, const Share& share, const Read& read, uint64_t* sums) {
  const int64_t chunks = (n / pattern.size + kChunk - 1) / kChunk;
  const auto partial = std::make_unique_for_overwrite<double[]>(chunks);
  alignas(64) BitsOf<T> space[kChunk];
  for (int64_t group = share.begin(pattern.size); group < share.end(pattern.size); ++group) {
    for (int64_t c = 0; c < chunks; ++c) {
      const Runs chunk = chunk_of_group(pattern, n, group, c);
      partial[c] = loop.chunk_of_magnitudes(read(chunk, space), chunk.n);
    }
    const double sum = sum_of_chunks(partial.get(), chunks);
    sums[group] = std::bit_cast<uint64_t>(std::isnan(sum) ? std::numeric_limits<double>::quiet_NaN() : sum);
  }
}

// Writes the cut that keeps the `kept` largest of the sums, neither none nor all of them, to its row.
inline void rank_groups(const Loops<double>& loop, const uint64_t* sums, int64_t size, int64_t kept, int64_t* row) {
  const auto scratch = std::make_unique_for_overwrite<uint64_t[]>(size / 4 + kStoreSlack);
  const Rank<uint64_t> t = rank_largest(loop, sums, size, kept, uint64_t{0}, kBeyond<uint64_t>, scratch.get());
  row[kKey] = cut_key<double>(t.magnitude);
  row[kIndex] = index_of_tie(loop, sums, size, t.magnitude, kept - t.above);
}

// The cut of a layer with a pattern, and all that its mask is made from besides the scores.
struct PatternCut {
  int64_t key, index;
  const uint64_t* sums;  // of the groups, if it has groups

  PatternCut(const int64_t* row, const uint64_t* group_sums) : key(row[kKey]), index(row[kIndex]), sums(group_sums) {}
  bool keeps_group(int64_t group) const {
    const auto sum = static_cast<int64_t>(sums[group]);
    return sum > key || (sum == key && group >= index);
  }
};

// The mask of a tile. x: the bits of its scores, which only windows look at.
template <class T>
void keep_in_tile(const Loops<T>& loop, const Pattern& pattern, const PatternCut& cut, const Tile& tile, const BitsOf<T>* x,
                  BitsOf<T>* keep) {
  const Runs& elements = tile.elements;
  if (pattern.kind == kWindow) {
    loop.window_keep(x, elements.n, pattern.size, std::min(pattern.block, elements.run), cut.index, keep);
    return;
  }
  int64_t group = elements.front() / pattern.block % pattern.size, left = pattern.block - elements.front() % pattern.block;
  for (int64_t at = 0, count; at < elements.n; at += count, left = pattern.block) {
    count = std::min(left, elements.n - at);
    std::fill_n(keep + at, count, static_cast<BitsOf<T>>(-static_cast<BitsOf<T>>(cut.keeps_group(group))));
    if (++group == pattern.size) group = 0;
  }
}

}  // namespace s2ap

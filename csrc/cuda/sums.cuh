// Sums of squares in the order that reference.sum_of_squares pins, so that a norm has the same bits in every run, on every
// grid and on the CPU. One warp sums one chunk; the chunks' sums are summed the same way, level by level, with a grid
// barrier between levels. Summing a single number again gives the same number, so layers of all sizes go through the same levels.
#pragma once

#include "number.cuh"
#include "table.cuh"

namespace s2ap::cuda {

// The 64 running sums of a chunk, two in each thread of the warp, by halves; the result is lane 0's.
template <class Grid>
S2AP_DEVICE double fold_lanes(const Grid& grid, double low, double high) {
  double sum = add(low, high);
  for (unsigned half = kWarp / 2; half > 0; half /= 2) sum = add(sum, grid.shuffle(sum, (grid.lane() + half) % kWarp));
  return sum;
}

// term(load(0)) + ... + term(load(count - 1)), count <= kChunk, in lane 0. Thread j of the warp carries the running sums j and j + 32.
template <class Grid, class Load, class Term>
S2AP_DEVICE double chunk_sum(const Grid& grid, int count, Load load, Term term) {
  static_assert(kLanes == 2 * kWarp);
  using V = decltype(load(0));
  constexpr int unroll = kUnrollOf<V>;
  double low = 0, high = 0;
  for (int base = static_cast<int>(grid.lane()); base - static_cast<int>(grid.lane()) < count; base += unroll * kLanes) {
    V a[unroll], b[unroll];
    S2AP_UNROLL
    for (int u = 0; u < unroll; ++u) {
      int i = base + u * kLanes, j = i + static_cast<int>(kWarp);
      a[u] = i < count ? load(i) : V{};
      b[u] = j < count ? load(j) : V{};
    }
    S2AP_UNROLL
    for (int u = 0; u < unroll; ++u) {
      int i = base + u * kLanes, j = i + static_cast<int>(kWarp);
      low = add(low, i < count ? term(a[u]) : 0);
      high = add(high, j < count ? term(b[u]) : 0);
    }
  }
  return fold_lanes(grid, low, high);
}

template <class T>
S2AP_DEVICE double square(T x) {
  double wide = widen(x);
  return multiply(wide, wide);
}

// One or two quantities per layer. Level k's sums lie in level[k % 2], at quantity * chunks + first chunk of the layer + j.
struct Sums {
  double* level[2];  // [quantities * chunks] each
  int levels;        // 1 + how often the chunks' sums must be summed again
  int quantities = 2;
};

// The arrays of the workspace, as everywhere.
template <class Row, class Array>
void for_each_array(Sums& sums, const Table<Row>& table, Array&& array) {
  for (double*& level : sums.level) array(level, sums.quantities * table.chunks());
}

template <class Row>
inline int sum_levels(const Table<Row>& table) {
  int levels = 1;
  for (int layer = 0; layer < table.layers; ++layer) {
    int needed = 1;
    for (int64_t left = table.first_chunk[layer + 1] - table.first_chunk[layer]; left > 1; left = (left + kChunk - 1) / kChunk) ++needed;
    if (needed > levels) levels = needed;
  }
  return levels;
}

// Level 0: each block sums the chunks of its own range. square_chunk(row, quantity, first, length) is the sum of squares of a chunk, in
// lane 0.
template <class Grid, class Row, class SquareChunk>
S2AP_DEVICE void sum_squares(const Grid& grid, const Table<Row>& table, const Sums& sums, SquareChunk square_chunk) {
  for_each_segment(grid, table, [&](Segment segment) {
    const Row& row = table.rows[segment.layer];
    int64_t begin = segment.begin * sums.quantities, end = segment.end * sums.quantities;
    for (int64_t task = begin + grid.warp(); task < end; task += grid.warps()) {
      int64_t chunk = task / sums.quantities, first = chunk * kChunk;
      int quantity = static_cast<int>(task % sums.quantities);
      double sum = square_chunk(row, quantity, first, chunk_length(row.n, chunk));
      if (grid.lane() == 0) sums.level[0][quantity * table.chunks() + table.first_chunk[segment.layer] + chunk] = sum;
    }
  });
}

// Level 1 and above: the warps of the whole grid share the sums' chunks.
template <class Grid, class Row>
S2AP_DEVICE void sum_again(const Grid& grid, const Table<Row>& table, const Sums& sums, int level) {
  const double* in = sums.level[(level - 1) % 2];
  double* out = sums.level[level % 2];
  int64_t warps = static_cast<int64_t>(grid.blocks()) * grid.warps();
  int64_t turn = static_cast<int64_t>(grid.block()) * grid.warps() + grid.warp();  // counts down to this warp's next task
  for (int layer = 0; layer < table.layers; ++layer) {
    int64_t first = table.first_chunk[layer], count = table.first_chunk[layer + 1] - first;
    for (int k = 1; k < level; ++k) count = (count + kChunk - 1) / kChunk;
    int64_t groups = (count + kChunk - 1) / kChunk;
    for (; turn < sums.quantities * groups; turn += warps) {
      int64_t group = turn / sums.quantities, at = turn % sums.quantities * table.chunks() + first;
      const double* terms = in + at + group * kChunk;
      double sum = chunk_sum(grid, chunk_length(count, group), [&](int i) { return terms[i]; }, [](double x) { return x; });
      if (grid.lane() == 0) out[at + group] = sum;
    }
    turn -= sums.quantities * groups;
  }
}

// The finished sum of a layer.
template <class Row>
S2AP_DEVICE double sum_of_squares(const Table<Row>& table, const Sums& sums, int layer, int quantity) {
  if (table.rows[layer].n == 0) return 0;
  return sums.level[(sums.levels - 1) % 2][quantity * table.chunks() + table.first_chunk[layer]];
}

}  // namespace s2ap::cuda

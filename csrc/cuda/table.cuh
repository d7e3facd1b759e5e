// The layers of one launch, and how they are shared out: every layer is cut into chunks of kChunk elements, and each block takes an
// equal, contiguous range of the chunks of all layers together, whatever layers they fall in.
//
// The table travels by value as a kernel parameter. So it needs no copy to the device, no buffer that must outlive
// the launch, and a CUDA graph keeps its own. Parameters beyond 4 KB need CUDA 12.1; torch 2.11 needs 12.6. More layers
// than the table holds are several launches.
#pragma once

#include <type_traits>

#include "../plan.h"
#include "grid.cuh"

namespace s2ap::cuda {

constexpr int kMaxLayers = 256;
constexpr int kUnroll = 8;  // loads that a thread has in flight
// Of a struct, which takes several loads, half as many: there are as many in flight, and registers do not hold more.
template <class V>
constexpr int kUnrollOf = std::is_class_v<V> && sizeof(V) > sizeof(uint16_t) ? kUnroll / 2 : kUnroll;

template <class Row>  // Row has n, the number of elements
struct Table {
  Row rows[kMaxLayers];
  int64_t first_chunk[kMaxLayers + 1];  // [layers + 1], in the numbering of all layers together
  int layers;

  Table() : layers(0) { first_chunk[0] = 0; }

  void push(const Row& row) {
    rows[layers] = row;
    first_chunk[layers + 1] = first_chunk[layers] + (row.n + kChunk - 1) / kChunk;
    ++layers;
  }
  S2AP_HD int64_t chunks() const { return first_chunk[layers]; }
};

// A run of chunks of one layer.
struct Segment {
  int layer;
  int64_t begin, end;  // chunks, counted from the layer's first
};

// Calls use(segment) for each layer that has chunks in this block's range, in order.
template <class Grid, class Row, class Use>
S2AP_DEVICE void for_each_segment(const Grid& grid, const Table<Row>& table, Use use) {
  int64_t begin = table.chunks() * grid.block() / grid.blocks();
  int64_t end = table.chunks() * (grid.block() + 1) / grid.blocks();
  if (begin == end) return;
  int layer = 0;
  for (int above = table.layers; above - layer > 1;) {  // the last layer with first_chunk <= begin
    int middle = (layer + above) / 2;
    (table.first_chunk[middle] <= begin ? layer : above) = middle;
  }
  for (; begin < end; ++layer) {
    int64_t first = table.first_chunk[layer], stop = table.first_chunk[layer + 1];
    if (stop > end) stop = end;
    if (stop > begin) {
      use(Segment{layer, begin - first, stop - first});
      begin = stop;
    }
  }
}

S2AP_HD int chunk_length(int64_t n, int64_t chunk) {
  int64_t left = n - chunk * kChunk;
  return static_cast<int>(left < kChunk ? left : kChunk);
}

// Calls use(j, j < length, load(j)) for the elements j of a chunk, block-wide, with `unroll` loads in flight. All threads of the
// block take part in every round, also those with j >= length, whose value is V{}.
template <int unroll = kUnroll, class Grid, class Load, class Use>
S2AP_DEVICE void for_each_element(const Grid& grid, int length, Load load, Use use) {
  using V = decltype(load(0));
  int threads = static_cast<int>(grid.threads()), thread = static_cast<int>(grid.thread());
  for (int base = 0; base < length; base += unroll * threads) {
    V values[unroll];
    S2AP_UNROLL
    for (int u = 0; u < unroll; ++u) {
      int j = base + u * threads + thread;
      values[u] = j < length ? load(j) : V{};
    }
    S2AP_UNROLL
    for (int u = 0; u < unroll; ++u) {
      int j = base + u * threads + thread;
      use(j, j < length, values[u]);
    }
  }
}

// A single warp of the grid, to work as a block does in for_each_element.
struct OneWarp {
  unsigned lane;

  S2AP_DEVICE unsigned thread() const { return lane; }
  S2AP_DEVICE unsigned threads() const { return kWarp; }
};

}  // namespace s2ap::cuda

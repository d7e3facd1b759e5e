// The inner loops of the sparse convolutions, compiled for three instruction sets and chosen when the program runs, as in loops.h.
//
// A tile is `rows` x `columns` output positions, each a vector register of sums, of one output channel after the other. For every kept
// weight there is one broadcast of its value, one look-up of where its inputs lie, and a multiply-add with an operand from memory for each
// position. The loads are the limit: a machine does as many multiply-adds as it does loads from its first-level cache, and fewer from the
// second.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "element.h"
#include "machine.h"

namespace s2ap {

// Asks for the line at p, wherever that is, into the second-level cache. (GCC deletes calls of functions that do nothing but ask, unless
// there is an asm in them.)
S2AP_INLINE void ask_for(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

// Inputs that will be needed: the lines at `offsets` from `first` on, those as far from `first + step`, and so on.
struct Ahead {
  const float* first = nullptr;
  int64_t times = 0, step = 0;
  const int32_t* offsets = nullptr;
  int64_t lines = 0;

  const float* end() const { return first + times * step; }
  S2AP_INLINE void ask_from(const float* from) const {
    for (int64_t i = 0; i < lines; ++i) ask_for(from + offsets[i]);
  }
  void ask() const {
    for (const float* from = first; from < end(); from += step) ask_from(from);
  }
};

constexpr int kWidest = 14;  // sums that 16 registers have room for, beside a value and an operand
constexpr int kShort = 6;    // columns of a short row: sums enough to keep the machine busy

// How outputs are cut into tiles: rows of a tile, tiles side by side. Short rows, and two of them where they share inputs, have fewer
// neighbours than a long one, so that more channels' inputs fit the first-level cache. `step`: from an output's inputs to the next one's,
// along either axis.
struct Tiling {
  int64_t tall, across;
  Tiling(int64_t height, int64_t width, int64_t step) : tall(step == 1 ? std::min<int64_t>(height, 2) : 1) {
    const int64_t columns = height == 1 ? kWidest : kShort;
    across = (width + columns - 1) / columns;
  }
  int64_t rows(int64_t left) const { return std::min(tall, left); }
};

// Of products of gradients with inputs there are fewer sums, and gradients take the registers: vectors of a tile that there is room for.
constexpr int kMostProducts = 16;

struct ProductTiling {
  int64_t tall, across;  // a tile has as many rows as are left, 4, 2 or 1, and `tall` at most
  ProductTiling(int64_t height, int64_t width, int64_t lanes) {
    const int64_t most = lanes == 16 ? kMostProducts : 12;  // with vectors of 16 lanes come 32 registers, otherwise 16
    tall = height >= 4 && width <= most / 4 ? 4 : height >= 2 ? 2 : 1;
    across = (width + most / tall - 1) / (most / tall);
  }
  int64_t rows(int64_t left) const { return left >= tall ? tall : left >= 2 ? 2 : 1; }
};

// A tile of some output channels, and what it is made of. Lengths and offsets are in floats.
struct TileArgs {
  const float* in;         // the inputs of the tile's first position, for offset 0
  int64_t in_row;          // from one of its rows to the next
  const int32_t* starts;   // [channels + 1]: where each output channel's entries of a run begin
  const int32_t* offsets;  // [entries]: how far the inputs of an entry are from `in`
  const float* values;     // [entries]
  int64_t first, last;     // output channels
  Ahead ahead;             // asked for meanwhile, once for each output channel
  const float* resumed;    // where the sums start from, [channels][rows][columns][lanes]; null: from the bias
  const float* bias;       // [channels], or null
  bool ends;   // the sums are complete. If not, they go to `out` as they are, which is as `resumed`, and all below is left alone
  float* out;  // the first position of channel `first`
  int64_t out_channel, out_row, out_column;
  const float* residual;  // null, or what is added; lies as `out`
  bool relu;
  const float* gate;  // null, or results are 0 where it is 0 or less; lies as `out`
  bool streams;       // past the caches: only with vectors of 64 bytes, at multiples of these; order_streams() comes after the last
};
using TileLoop = void (*)(const TileArgs&);

// to[i] = from[i] and what follows the sums, for i < count.
struct FinishArgs {
  const float* from;
  float* to;
  const float *residual, *gate;  // as in TileArgs
  bool relu;
  int64_t count;
};

// sums[j] += the products of a tile of a gradient, of one output channel after the other, with the inputs of the channel's j-th entry.
struct ProductArgs {
  const float* gradient;  // its first position, of channel `first`
  int64_t channel, row, column;
  const float* in;  // the inputs of that position, for offset 0
  int64_t in_row;
  const int32_t* starts;   // [channels + 1]
  const int32_t* offsets;  // [entries]
  int64_t first, last;     // output channels
  float* sums;             // [entries]
};
using ProductLoop = void (*)(const ProductArgs&);

// offsets[j] = channel * c + tap_offsets[tap] for columns[j] = c * taps + tap.
struct PlaceArgs {
  const int32_t* columns;
  int64_t count, taps, channel;
  const int32_t* tap_offsets;
  int32_t* offsets;
};

struct TileLoops {
  // [step - 1][columns - 1]: columns whose inputs are `step` vectors apart
  std::array<std::array<TileLoop, kWidest>, 2> one_row;
  std::array<TileLoop, kShort> two_rows;                    // [columns - 1], of step 1
  std::array<ProductLoop, kMostProducts> one_row_products;  // [columns - 1]
  std::array<ProductLoop, kMostProducts / 2> two_rows_products;
  std::array<ProductLoop, kMostProducts / 4> four_rows_products;
  void (*finish)(const FinishArgs&);
  void (*place)(const PlaceArgs&);

  TileLoop tile(int64_t step, int64_t rows, int64_t columns) const {
    return rows == 2 ? two_rows[columns - 1] : one_row[step - 1][columns - 1];
  }
  ProductLoop products(int64_t rows, int64_t columns) const {
    return rows == 4 ? four_rows_products[columns - 1] : rows == 2 ? two_rows_products[columns - 1] : one_row_products[columns - 1];
  }
};

// Those of an instruction set, compiled in tiles.cpp.
const TileLoops& tile_loops(Isa isa);

}  // namespace s2ap

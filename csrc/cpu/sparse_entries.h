// The kept entries of a sparse convolution as tiles take them: offsets of their inputs, and values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"
#include "sparse_shape.h"
#include "tiles.h"

namespace s2ap {

// Memory of one thread that grows to what it was asked for and stays: fresh memory would cost a page fault for every 4 KB in every call.
enum class Scratch { kPacked, kInside, kResults, kWanted, kGradient, kStarts, kColumns, kOffsets, kValues, kPlaces };

constexpr int kScratchSlots = 4;  // of each kind, for what there is several of at a time

template <class T = float>
T* scratch(Scratch which, int64_t size, int slot = 0) {
  struct Block {
    std::unique_ptr<std::byte[]> memory;
    int64_t size = 0;
  };
  static thread_local Block blocks[static_cast<int>(Scratch::kPlaces) + 1][kScratchSlots];
  Block& block = blocks[static_cast<int>(which)][slot];
  constexpr int64_t kAlignment = 64;
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T)) + kAlignment;
  if (block.size < bytes) {
    block.memory = std::make_unique_for_overwrite<std::byte[]>(bytes);
    block.size = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
  return reinterpret_cast<T*>(block.memory.get() + (kAlignment - address % kAlignment) % kAlignment);
}

// The entries as tiles take them: those that reach an output, by where their inputs lie. They are cut into runs of input channels.
struct PlacedEntries {
  int64_t runs = 1;
  const int32_t* bounds;   // [runs + 1][rows]: where each row's entries of a run begin
  const int32_t* offsets;  // [entries]
  const float* values;     // [entries]

  // tap_offset [taps]: offset of a tap's input, or kUnreached; channel: from one channel to the next; each: channels of a run; slot: of the
  // scratch memory that they are kept in.
  PlacedEntries(const Machine& machine, const Entries& entries, int64_t rows, int64_t channels, const std::vector<int64_t>& tap_offset,
                int64_t channel, int64_t each, int slot = 0) {
    const auto taps = static_cast<int64_t>(tap_offset.size());
    const bool whole = std::find(tap_offset.begin(), tap_offset.end(), Axis::kUnreached) == tap_offset.end();
    const Entries kept = whole ? entries : reaching(machine, entries, rows, tap_offset, slot);
    values = kept.values;
    runs = (channels + each - 1) / each;

    const std::vector<int32_t> tap_offsets(tap_offset.begin(), tap_offset.end());  // those that are read fit
    const auto all = int64_t{kept.starts[rows]};
    auto* const to = scratch<int32_t>(Scratch::kOffsets, all + 1, slot);
    auto* const places = scratch<int32_t>(Scratch::kPlaces, (runs + 1) * rows, slot);
    constexpr int64_t kRows = 16;  // of a task
    for_each(machine, (rows + kRows - 1) / kRows, all + rows * runs * 16, [&](int64_t task) {
      const int64_t first = task * kRows, last = std::min(rows, first + kRows);
      const int64_t begin = kept.starts[first], count = kept.starts[last] - begin;
      tile_loops(machine.isa).place({kept.columns + begin, count, taps, channel, tap_offsets.data(), to + begin});
      for (int64_t r = first; r < last; ++r) {
        const int32_t *from = kept.columns + kept.starts[r], *const end = kept.columns + kept.starts[r + 1];
        for (int64_t run = 0; run < runs; ++run) {
          from = run == 0 ? from : std::lower_bound(from, end, run * each * taps);
          places[run * rows + r] = static_cast<int32_t>(from - kept.columns);
        }
        places[runs * rows + r] = kept.starts[r + 1];
      }
    });
    offsets = to;
    bounds = places;
  }

  const int32_t* starts(int64_t run, int64_t rows) const { return bounds + run * rows; }

 private:
  // The entries of those taps that reach an output.
  static Entries reaching(const Machine& machine, const Entries& entries, int64_t rows, const std::vector<int64_t>& tap_offset, int slot) {
    const auto taps = static_cast<int64_t>(tap_offset.size()), all = int64_t{entries.starts[rows]};
    std::vector<uint8_t> reaches(tap_offset.size());
    for (int64_t tap = 0; tap < taps; ++tap) reaches[tap] = tap_offset[tap] != Axis::kUnreached;
    auto* const starts = scratch<int32_t>(Scratch::kStarts, rows + 1, slot);
    auto* const columns = scratch<int32_t>(Scratch::kColumns, all + 1, slot);
    float* const values = scratch(Scratch::kValues, all + 1, slot);
    const uint64_t part = ((uint64_t{1} << 32) + taps - 1) / taps;
    const auto reached = [&](int32_t j) -> int32_t {
      const auto column = static_cast<uint32_t>(entries.columns[j]);
      return reaches[column - static_cast<uint32_t>(column * part >> 32) * taps];
    };
    starts[0] = 0;
    for_each(machine, rows, all, [&](int64_t r) {
      int32_t count = 0;
      for (int32_t j = entries.starts[r]; j < entries.starts[r + 1]; ++j) count += reached(j);
      starts[r + 1] = count;
    });
    for (int64_t r = 0; r < rows; ++r) starts[r + 1] += starts[r];
    for_each(machine, rows, all, [&](int64_t r) {
      int32_t to = starts[r];
      for (int32_t j = entries.starts[r]; j < entries.starts[r + 1] && to < starts[r + 1]; ++j) {
        columns[to] = entries.columns[j];  // or what follows takes its place
        values[to] = entries.values[j];
        to += reached(j);
      }
    });
    return {starts, columns, values};
  }
};

// Runs of input channels whose part of a tile's inputs stays in the first-level cache, but not so short that sums are loaded and stored for
// next to nothing. `tap_offset`: as above; `vectors`: of one channel that a tile reads.
inline int64_t channels_of_run(const Entries& entries, int64_t rows, int64_t channels, const std::vector<int64_t>& tap_offset, int64_t vectors,
                               int64_t lanes) {
  constexpr int64_t kInCache = 5 * 1024;  // floats
  constexpr double kWorthARun = 24;       // entries of a row
  const auto taps = static_cast<double>(tap_offset.size());
  const double share = 1 - static_cast<double>(std::count(tap_offset.begin(), tap_offset.end(), Axis::kUnreached)) / taps;
  const double per_channel = share * static_cast<double>(entries.starts[rows]) / static_cast<double>(rows * channels);
  const int64_t run = std::max({int64_t{1}, kInCache / (vectors * lanes), static_cast<int64_t>(kWorthARun / std::max(per_channel, 1e-3))});
  const int64_t runs = (channels + run - 1) / run;
  return (channels + runs - 1) / runs;
}

// A tile, run by run; what follows the sums comes with the last one. `args` lacks the entries' bounds and these. `rows`: of the entries.
inline void tile_in_runs(TileLoop tile, TileArgs& args, const PlacedEntries& placed, int64_t rows, const float* residual, const float* gate,
                         bool relu) {
  for (int64_t run = 0; run < placed.runs; ++run) {
    const bool last = run + 1 == placed.runs;
    args.starts = placed.starts(run, rows);
    args.ends = placed.starts(run + 1, rows);
    args.resume = run > 0;
    args.residual = last ? residual : nullptr;
    args.gate = last ? gate : nullptr;
    args.relu = last && relu;
    tile(args);
  }
}

// The work of a pass, in elements as for_each counts them: what is read and written, and the arithmetic.
inline int64_t work_of(int64_t positions, int64_t rows, int64_t channels, int64_t entries) {
  constexpr int64_t kMultiplyAdds = 8;  // that take as long as an element
  return positions * (rows + channels + entries / kMultiplyAdds);
}

// The offsets that offset(ky, kx) gives for all taps.
template <class F>
std::vector<int64_t> offsets_of_taps(const ConvShape& shape, const F& offset) {
  std::vector<int64_t> offsets;
  for (int64_t ky = 0; ky < shape.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < shape.kernel[1]; ++kx) offsets.push_back(offset(ky, kx));
  }
  return offsets;
}

}  // namespace s2ap

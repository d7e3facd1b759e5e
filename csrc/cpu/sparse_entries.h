// The kept entries of a sparse convolution as tiles take them: offsets of their inputs, and values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../plan.h"
#include "machine.h"
#include "sparse_shape.h"
#include "tiles.h"

namespace s2ap {

// Memory of one thread that grows to what it was asked for and stays: fresh memory would cost a page fault for every 4 KB in every call.
enum class Scratch { kPacked, kInside, kSums, kWaiting, kWanted, kGradient, kPartial, kOffsets, kKinds };

template <class T = float>
T* scratch(Scratch which, int64_t size) {
  struct Block {
    std::unique_ptr<std::byte[]> memory;
    int64_t size = 0;
  };
  static thread_local Block blocks[static_cast<int>(Scratch::kKinds)];
  Block& block = blocks[static_cast<int>(which)];
  constexpr int64_t kAlignment = 64;
  const int64_t bytes = size * static_cast<int64_t>(sizeof(T)) + kAlignment;
  if (block.size < bytes) {
    block.memory = std::make_unique_for_overwrite<std::byte[]>(bytes);
    block.size = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
  return reinterpret_cast<T*>(block.memory.get() + (kAlignment - address % kAlignment) % kAlignment);
}

// The outputs that `y` and `x` describe, and where the entries that reach them start.
struct Pass {
  Axis y, x;
  const int32_t* starts;
};

inline std::vector<Pass> forward_passes(const ConvShape& shape, const Entries& entries) {
  return {{forward_axis(shape, 0), forward_axis(shape, 1), entries.pass(0)}};
}

// Those of the gradient with respect to the input.
inline std::vector<Pass> backward_passes(const ConvShape& shape, const Entries& entries) {
  std::vector<Pass> passes;
  for_each_residue(shape, [&](int64_t pass, const Axis& y, const Axis& x) { passes.push_back({y, x, entries.pass(pass)}); });
  return passes;
}

// Where the inputs of each entry lie, [entries]; it holds until the next call on this thread. offset(dy, dx): of what a tap with these
// shifts reads; channel: from one channel to the next.
template <class F>
const int32_t* place(const Machine& machine, const ConvShape& shape, const std::vector<Pass>& passes, const Entries& entries, int64_t count,
                     int64_t channel, const F& offset) {
  std::vector<int32_t> tap_offsets(shape.taps());  // every tap is in one pass
  for (const Pass& pass : passes) {
    for_each_tap(shape, pass.y, pass.x,
                 [&](int64_t tap, int64_t dy, int64_t dx) { tap_offsets[tap] = static_cast<int32_t>(offset(dy, dx)); });
  }
  auto* const offsets = scratch<int32_t>(Scratch::kOffsets, count + 1);
  for_each(machine, (count + kChunk - 1) / kChunk, count, [&](int64_t task) {
    const int64_t begin = task * kChunk, size = std::min(count - begin, kChunk);
    tile_loops(machine.isa).place({entries.columns + begin, size, shape.taps(), channel, tap_offsets.data(), offsets + begin});
  });
  return offsets;
}

struct Range {
  int64_t first, last;
};

// The channels that a run of entries reads.
inline Range read_by_run(int64_t run, const Entries& entries, int64_t channels) {
  const int64_t each = (channels + entries.runs - 1) / entries.runs;
  return {run * each, std::min(channels, (run + 1) * each)};
}

// A tile of `size` floats for each channel, run by run; ahead(run): what to ask for during a run. `args` has the first run's starts. Sums
// wait for the next run where they lie close together; what follows them comes with the last run, which writes them to where they belong.
template <class F>
void tile_in_runs(TileLoop tile, int64_t size, TileArgs args, const Entries& entries, const F& ahead) {
  const TileArgs last = args;
  if (args.ends && entries.runs > 1) {
    args.ends = false;
    args.out = scratch(Scratch::kWaiting, (args.last - args.first) * size);
  }
  const float* const waiting = args.out;
  for (int64_t run = 0; run < entries.runs; ++run) {
    if (run + 1 == entries.runs) args = last;
    args.ahead = ahead(run);
    args.starts = last.starts + run * entries.rows;
    args.resumed = run > 0 ? waiting : nullptr;
    tile(args);
  }
}

// The work of a pass, in elements as for_each counts them: what is read and written, and the arithmetic.
inline int64_t work_of(int64_t positions, int64_t rows, int64_t channels, int64_t entries) {
  constexpr int64_t kMultiplyAdds = 8;           // that take as long as an element
  constexpr int64_t kEnough = int64_t{1} << 24;  // for any number of threads, and no product overflows
  return std::min(positions, kEnough) * (rows + channels + entries / kMultiplyAdds);
}

}  // namespace s2ap

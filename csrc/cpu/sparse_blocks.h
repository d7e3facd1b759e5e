// sparse_conv and its gradient with respect to the input, on activations in blocks: what networks for inference and attacks compute with.
// Nothing is packed; everything else is as in sparse_conv.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sparse_entries.h"
#include "sparse_shape.h"
#include "tiles.h"

namespace s2ap {

// Activations in blocks: [batch / lanes][channels][height + 2 halo][width + 2 halo][lanes], the halo being zeros. Nothing needs to be
// packed then: a tile reads its inputs where they are.
template <class T>
struct Blocks {
  T* data = nullptr;
  int64_t count = 0, channels = 0, height = 0, width = 0, halo = 0, lanes = 0;  // height and width: without the halo

  int64_t row() const { return (width + 2 * halo) * lanes; }
  int64_t channel() const { return (height + 2 * halo) * row(); }
  T* at(int64_t block, int64_t c, int64_t y, int64_t x) const {
    return data + (block * channels + c) * channel() + (y + halo) * row() + (x + halo) * lanes;
  }
};

// Whether all that the pass reads lies within the halo.
inline bool reaches(const Axis& axis, int64_t halo) {
  for (int64_t shift : axis.shifts) {
    if (shift == Axis::kUnreached) continue;
    if (shift < -halo || (axis.outputs - 1) * axis.in_step + shift >= axis.in_size + halo) return false;
  }
  return true;
}

// The inputs that tiles at the same place read, in all passes.
class Window {
 public:
  explicit Window(const std::vector<Pass>& passes) : y_(passes[0].y), x_(passes[0].x) {
    for (const Pass& pass : passes) {
      extend(y_, pass.y);
      extend(x_, pass.x);
    }
  }

  // Asks for what a tile is about to read into the second-level cache: some channels' rows, but those that the tile above has read. (What a kept
  // weight reads is too short for the machine to foresee.)
  void prefetch(const Blocks<const float>& in, const float* first, Range channels, bool topmost, int64_t height, int64_t width) const {
    const int64_t end = (height - 1) * y_.in_step + y_.most() + 1;
    const int64_t start = topmost ? y_.least() : std::max(y_.least(), end - height * y_.in_step);
    const int64_t vectors = (width - 1) * x_.in_step + x_.most() - x_.least() + 1;
    for (int64_t c = channels.first; c < channels.last; ++c) {
      for (int64_t row = start; row < end; ++row) {
        const float* const from = first + c * in.channel() + row * in.row() + x_.least() * in.lanes;
        for (int64_t i = 0; i < vectors * in.lanes; i += 16) ask_for(from + i);
      }
    }
  }

 private:
  Axis y_, x_;
};

// Whether results are better written past the caches: where these are too small for what is read and what is written, results would take the
// place of inputs that are still to be read, and every line of them would be read from memory first.
template <class T>
bool past_caches(const Machine& machine, const Blocks<const float>& in, const Blocks<T>& out) {
  const int64_t floats = in.count * in.channels * in.channel() + out.count * out.channels * out.channel();
  const bool whole_lines = machine.isa == Isa::kAvx512 && reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  return whole_lines && machine.last_cache > 0 && floats * static_cast<int64_t>(sizeof(float)) > machine.last_cache / 2;
}

// The outputs of several passes, which are each other's neighbours and read the same inputs: tile by tile they take turns, while both are in
// the cache.
inline void block_passes(const Machine& machine, const ConvShape& shape, const std::vector<Pass>& passes, const Entries& entries,
                         int64_t count, const Blocks<const float>& in, const Epilogue<Blocks<const float>>& epilogue,
                         const Blocks<float>& out) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t rows = out.channels / shape.groups, channels = in.channels / shape.groups;
  const int64_t tall = passes[0].y.outputs, wide = passes[0].x.outputs;  // the others have as many outputs or fewer
  const int64_t blocks = out.count * shape.groups;
  const int64_t pairs = (tall + 1) / 2;  // of rows
  const int64_t pieces = std::clamp<int64_t>(machine.threads > 1 ? (8 * machine.threads + blocks - 1) / blocks : 1, 1, pairs);
  const int64_t work = work_of(out.count * tall * wide * out.lanes, rows, channels, count);
  const Tiling tiles(tall, wide, std::max(passes[0].y.in_step, passes[0].x.in_step));
  const Window window(passes);
  const bool streams = past_caches(machine, in, out);
  const int32_t* const offsets = place(machine, shape, passes, entries, count, in.channel(),
                                       [&](int64_t dy, int64_t dx) { return dy * in.row() + dx * in.lanes; });

  for_each(machine, blocks * pieces, work, [&](int64_t task) {
    const int64_t piece = task % pieces, group = task / pieces % shape.groups, block = task / pieces / shape.groups;
    const int64_t top = pairs * piece / pieces * 2, bottom = std::min(tall, pairs * (piece + 1) / pieces * 2);
    TileArgs args{};
    args.first = group * rows;
    args.last = (group + 1) * rows;
    args.out_channel = out.channel();
    args.bias = epilogue.bias;
    args.ends = true;
    args.relu = epilogue.relu;
    args.streams = streams;
    args.offsets = offsets;
    args.values = entries.values;
    const auto run_tile = [&](const Pass& pass, int64_t oy, int64_t ox, int64_t height, int64_t width) {
      const auto& [y, x, starts] = pass;
      const auto place = [&](const auto& images) {
        return images.data ? images.at(block, args.first, y.out_first + oy * y.out_step, x.out_first + ox * x.out_step) : nullptr;
      };
      args.in = in.at(block, group * channels, oy * y.in_step, ox * x.in_step);
      args.in_row = y.in_step * in.row();
      args.starts = starts;
      args.out = place(out);
      args.out_row = y.out_step * out.row();
      args.out_column = x.out_step * out.lanes;
      const auto before = [&](int64_t run) {
        if (&pass == &passes[0]) window.prefetch(in, args.in, read_by_run(run, entries, channels), oy == top, height, width);
      };
      args.residual = place(epilogue.residual);
      args.gate = place(epilogue.gate);
      tile_in_runs(loops.tile(x.in_step, height, width), height * width * out.lanes, args, entries, before);
    };
    for (int64_t oy = top, height; oy < bottom; oy += height) {
      height = std::min(tiles.tall, bottom - oy);
      for (int64_t i = 0; i < tiles.across; ++i) {
        const int64_t ox = wide * i / tiles.across, width = wide * (i + 1) / tiles.across - ox;
        for (const Pass& pass : passes) {
          const int64_t tile_rows = std::min(height, pass.y.outputs - oy), tile_columns = std::min(width, pass.x.outputs - ox);
          if (tile_rows > 0 && tile_columns > 0) run_tile(pass, oy, ox, tile_rows, tile_columns);
        }
      }
    }
    if (streams) order_streams();
  });
}

inline void sparse_conv(const Machine& machine, const ConvShape& shape, const Entries& entries, const Blocks<const float>& in,
                        const Epilogue<Blocks<const float>>& epilogue, const Blocks<float>& out) {
  block_passes(machine, shape, forward_passes(shape, entries), entries, entries.count(1), in, epilogue, out);
}

inline void sparse_conv_input_grad(const Machine& machine, const ConvShape& shape, const Entries& entries, const Blocks<const float>& grad,
                                   const Epilogue<Blocks<const float>>& epilogue, const Blocks<float>& out) {
  block_passes(machine, shape, backward_passes(shape, entries), entries, entries.count(shape.passes()), grad, epilogue, out);
}

}  // namespace s2ap

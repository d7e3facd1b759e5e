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

  // Where the lines of so many channels lie that a tile reads, from its first input on; without those that the tile above has read, if
  // there is one.
  std::vector<int32_t> lines(const Blocks<const float>& in, int64_t channels, bool topmost, int64_t height, int64_t width) const {
    const int64_t end = (height - 1) * y_.in_step + y_.most() + 1;
    const int64_t start = topmost ? y_.least() : std::max(y_.least(), end - height * y_.in_step);
    const int64_t vectors = (width - 1) * x_.in_step + x_.most() - x_.least() + 1;
    std::vector<int32_t> lines;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t row = start; row < end; ++row) {
        const int64_t from = c * in.channel() + row * in.row() + x_.least() * in.lanes;
        for (int64_t i = 0; i < vectors * in.lanes; i += 16) lines.push_back(static_cast<int32_t>(from + i));
      }
    }
    return lines;
  }

 private:
  Axis y_, x_;
};

// The outputs of several passes, which are each other's neighbours and read the same inputs: tile by tile they take turns, while both are
// in the cache. What a kept weight reads is too short for the machine to foresee, so a tile, or a run of it, asks for the next one's
// inputs: few at a time, for more than the machine can wait for would hold up the arithmetic.
inline void block_passes(const Machine& machine, const ConvShape& shape, const std::vector<Pass>& passes, const Entries& entries,
                         int64_t count, const Blocks<const float>& in, const Epilogue<Blocks<const float>>& epilogue,
                         const Blocks<float>& out) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t rows = out.channels / shape.groups, channels = in.channels / shape.groups;
  const int64_t tall = passes[0].y.outputs, wide = passes[0].x.outputs;  // the others have as many outputs or fewer
  const int64_t step_y = passes[0].y.in_step, step_x = passes[0].x.in_step;
  const int64_t blocks = out.count * shape.groups;
  const int64_t pairs = (tall + 1) / 2;  // of rows
  const int64_t pieces = std::clamp<int64_t>(machine.threads > 1 ? (8 * machine.threads + blocks - 1) / blocks : 1, 1, pairs);
  const int64_t work = work_of(out.count * tall * wide * out.lanes, rows, channels, count);
  const int64_t floats = in.count * in.channels * in.channel() + out.count * out.channels * out.channel();
  const bool streams = past_caches(machine, floats) && is_line(out.data);
  const int32_t* const offsets =
      place(machine, shape, passes, entries, count, in.channel(), [&](int64_t dy, int64_t dx) { return dy * in.row() + dx * in.lanes; });
  const Tiling tiles(tall, wide, std::max(step_y, step_x));
  const Window window(passes);
  const int64_t narrow = wide / tiles.across;                     // a tile has so many columns, or one more
  const int64_t channels_at_once = (channels + rows - 1) / rows;  // of the inputs, asked for with each output channel
  const auto lines = [&](bool topmost, int64_t width) { return window.lines(in, channels_at_once, topmost, tiles.tall, width); };
  const std::vector<int32_t> lines_of[2][2] = {{lines(false, narrow), lines(false, narrow + 1)},
                                               {lines(true, narrow), lines(true, narrow + 1)}};

  for_each(machine, blocks * pieces, work, [&](int64_t task) {
    const int64_t piece = task % pieces, group = task / pieces % shape.groups, block = task / pieces / shape.groups;
    const int64_t top = pairs * piece / pieces * 2, bottom = std::min(tall, pairs * (piece + 1) / pieces * 2);
    struct Tile {
      int64_t y, x, height, width;  // in outputs of the first pass
    };
    const int64_t tile_count = (bottom - top + tiles.tall - 1) / tiles.tall * tiles.across;
    const auto tile_at = [&](int64_t i) {
      const int64_t y = top + i / tiles.across * tiles.tall, column = i % tiles.across, x = wide * column / tiles.across;
      return Tile{y, x, std::min(tiles.tall, bottom - y), wide * (column + 1) / tiles.across - x};
    };
    const auto inputs = [&](const Tile& t, int64_t run) {
      const Range read = read_by_run(run, entries, channels);
      const std::vector<int32_t>& at = lines_of[t.y == top][t.width - narrow];
      const int64_t times = (read.last - read.first + channels_at_once - 1) / channels_at_once;
      return Ahead{in.at(block, group * channels + read.first, t.y * step_y, t.x * step_x), times, channels_at_once * in.channel(),
                   at.data(), static_cast<int64_t>(at.size())};
    };
    TileArgs args{};
    args.offsets = offsets;
    args.values = entries.values;
    args.first = group * rows;
    args.last = (group + 1) * rows;
    args.bias = epilogue.bias;
    args.ends = true;
    args.out_channel = out.channel();
    args.relu = epilogue.relu;
    args.streams = streams;
    if (tile_count > 0) inputs(tile_at(0), 0).ask();
    for (int64_t i = 0; i < tile_count; ++i) {
      const Tile t = tile_at(i);
      for (const Pass& pass : passes) {
        const auto& [y, x, starts] = pass;
        const int64_t height = std::min(t.height, y.outputs - t.y), width = std::min(t.width, x.outputs - t.x);
        if (height <= 0 || width <= 0) continue;
        const auto place = [&](const auto& images) {
          return images.data ? images.at(block, args.first, y.out_first + t.y * y.out_step, x.out_first + t.x * x.out_step) : nullptr;
        };
        args.in = in.at(block, group * channels, t.y * step_y, t.x * step_x);
        args.in_row = step_y * in.row();
        args.starts = starts;
        args.out = place(out);
        args.out_row = y.out_step * out.row();
        args.out_column = x.out_step * out.lanes;
        args.residual = place(epilogue.residual);
        args.gate = place(epilogue.gate);
        const auto ahead = [&](int64_t run) {
          if (&pass != &passes[0]) return Ahead{};
          if (run + 1 < entries.runs) return inputs(t, run + 1);
          return i + 1 < tile_count ? inputs(tile_at(i + 1), 0) : Ahead{};
        };
        tile_in_runs(loops.tile(step_x, height, width), height * width * out.lanes, args, entries, ahead);
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

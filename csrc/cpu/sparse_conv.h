// sparse_conv: convolution with the kept weights of a layer, its gradient with respect to the input, and that with respect to those
// weights.
//
// What is computed is torch's conv2d with a weight most of whose entries are 0: any kernel size, stride, padding, dilation and groups, a
// linear layer being the case of one position. The kept entries come in rows, one for each output channel, as in a CSR matrix whose columns
// are flat indices into the weight of that channel (input channel, then kernel row and column).
//
// How. Nothing is skipped and nothing is looked up per position: every kept entry becomes an offset into a packed copy of the input and a
// value (tiles.h), and each tile of output positions runs through the entries of one output channel after the other. The packed copy holds
// a piece of the input that fits the second-level cache, with the padding around it as zeros, so that there are no borders. Input positions
// that a stride skips between two outputs are apart in it ("phases"), so that neighbouring outputs read neighbouring vectors whatever the
// stride. A tile takes the entries in runs of input channels (sparse_pattern.h), so that a run's inputs stay near; between two runs its
// sums wait.
//
// Vectors are made in one of two ways:
//   Images     a vector is the same position of as many images as it has lanes. Activations whose strides have the batch innermost
//              (logical shape (N, C, H, W), memory C, H, W, N) are packed and written by whole vectors.
//   Positions  a vector is consecutive positions of the padded plane, image after image: for few images, or one, and for linear layers.
//              Those positions that are padding are computed too, and dropped.
//
// The gradient with respect to the input is the same with rows and columns of the weight exchanged. With a stride, the input's positions
// of each residue are an output of their own, that some of the kernel's entries reach ("passes"); they share what is packed.
//
// The gradient of a kept weight is a dot product over all positions and images, tile by tile. Slices of these are added up in a fixed
// order, and every output is one sum in a fixed order, so that the bits do not depend on the number of threads.
//
// Bytes: input read, and packed again (1 + halo) times into the cache; output written; 8 bytes for an entry and tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../plan.h"
#include "sparse_entries.h"
#include "sparse_layout.h"
#include "sparse_shape.h"
#include "tiles.h"

namespace s2ap {

// Where the results of a pass belong, and what follows the sums there.
template <class T>
struct Results {
  const TileLoops& loops;
  const Axis &y, &x;
  const Epilogue<Images<const T>>& epilogue;
  const Images<T>& out;

  template <class U>
  U* at(const Images<U>& images, int64_t n, int64_t channel, int64_t oy, int64_t ox) const {
    if (images.data == nullptr) return nullptr;
    return images.data + n * images.n + channel * images.c + (y.out_first + oy * y.out_step) * images.h +
           (x.out_first + ox * x.out_step) * images.w;
  }

  bool alike() const {
    const auto as_out = [&](const Images<const T>& images) {
      return images.data == nullptr || (images.n == out.n && images.c == out.c && images.h == out.h && images.w == out.w);
    };
    return as_out(epilogue.residual) && as_out(epilogue.gate);
  }

  // from[0], from[step] and on are the `count` sums of one row, from (n, channel, oy, ox) on.
  void write(const float* from, int64_t step, int64_t count, int64_t n, int64_t channel, int64_t oy, int64_t ox) const {
    const T *const residual = at(epilogue.residual, n, channel, oy, ox), *const gate = at(epilogue.gate, n, channel, oy, ox);
    T* const to = at(out, n, channel, oy, ox);
    const auto finished = [&](int64_t i, int64_t residual_at, int64_t gate_at) {
      float result = from[i * step];
      if (residual) result += as_float(residual[residual_at]);
      if (epilogue.relu) result = result < 0 ? 0 : result;
      if (gate) result = as_float(gate[gate_at]) <= 0 ? 0 : result;
      return result;
    };
    const int64_t across = out.w * x.out_step;
    if (step == 1 && across == 1 && alike()) {
      if constexpr (std::is_same_v<T, float>) {
        loops.finish({from, to, residual, gate, epilogue.relu, count});
      } else {
        for (int64_t i = 0; i < count; ++i) assign(to[i], finished(i, i, i));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        assign(to[i * across], finished(i, i * epilogue.residual.w * x.out_step, i * epilogue.gate.w * x.out_step));
      }
    }
  }
};

// What a thread packs at once: the inputs of a few outputs, all channels of them. Where a kernel reaches extremely far that is too much,
// and a thread that finds no memory cannot say so.
inline void check_packed(int64_t floats) {
  constexpr int64_t kMost = int64_t{1} << 28;
  if (floats > kMost) {
    throw std::runtime_error("dilation: expected at most 2**28 inputs between an output's first and last one, got " +
                             std::to_string(floats));
  }
}

// The outputs of several passes, for all channels. They read the same inputs, which are packed once.
template <class T>
void conv_passes(const Machine& machine, const ConvShape& shape, const std::vector<Pass>& passes, int64_t channels, const Entries& entries,
                 int64_t count, const Images<const T>& in, const Epilogue<Images<const T>>& epilogue, const Images<T>& out) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t lanes = s2ap::lanes(machine.isa), rows = entries.rows, group_rows = rows / shape.groups;
  const int64_t group_channels = channels / shape.groups;
  Axis all_y = passes[0].y, all_x = passes[0].x;
  for (const Pass& pass : passes) {
    extend(all_y, pass.y);
    extend(all_x, pass.x);
  }
  const Layout layout(all_y, all_x, shape.batch, group_channels, lanes);
  check_packed(layout.packed());
  const int32_t* const offsets =
      place(machine, shape, passes, entries, count, layout.channel(), [&](int64_t dy, int64_t dx) { return layout.offset(dy, dx); });
  // Where there are fewer pieces than threads can share, rows are shared out too; a piece is then packed again for each share.
  const int64_t together = layout.together(), tasks = (layout.pieces() + together - 1) / together * shape.groups;
  const int64_t shares = std::clamp<int64_t>(machine.threads / tasks, 1, std::max<int64_t>(1, group_rows / 8));
  const int64_t work = work_of(shape.batch * all_y.outputs * all_x.outputs, rows, channels, count);
  const bool whole_lines = is_line(out.data) && out.c % lanes == 0 && out.h % lanes == 0 && out.w % lanes == 0;
  const bool streams = whole_lines && past_caches(machine, shape.activations());

  const auto nothing_ahead = [](int64_t) { return Ahead{}; };  // a packed piece is in the second-level cache as it is

  // One pass, at a tile of a packed piece.
  const auto run_tile = [&](const Pass& pass, const Layout::Piece& p, TileArgs args, int64_t tile_rows, int64_t tile_columns, int64_t ty,
                            int64_t tx) {
    const auto& [y, x, starts] = pass;
    if (layout.by_images()) {  // other passes may have more outputs
      tile_rows = std::min(tile_rows, y.outputs - p.y0 - ty);
      tile_columns = std::min(tile_columns, x.outputs - p.x0 - tx);
      if (tile_rows <= 0 || tile_columns <= 0) return;
    }
    const TileLoop tile = loops.tile(1, tile_rows, tile_columns);
    const int64_t size = tile_rows * tile_columns * lanes;
    const Results<T> results{loops, y, x, epilogue, out};
    args.starts = starts;
    if constexpr (std::is_same_v<T, float>) {
      // Where a vector of results lies in memory as in a register, tiles write it.
      if (layout.by_images() && p.images == lanes && out.n == 1 && results.alike()) {
        const auto place = [&](const auto& images) { return results.at(images, p.n0, args.first, p.y0 + ty, p.x0 + tx); };
        args.out = place(out);
        args.out_channel = out.c;
        args.out_row = out.h * y.out_step;
        args.out_column = out.w * x.out_step;
        args.residual = place(epilogue.residual);
        args.gate = place(epilogue.gate);
        args.relu = epilogue.relu;
        args.ends = true;
        args.streams = streams;
        tile_in_runs(tile, size, args, entries, nothing_ahead);
        return;
      }
    }
    float* const sums = scratch(Scratch::kSums, (args.last - args.first) * size);
    struct Wanted {  // sums that are outputs, neighbours in one row
      int64_t at, n, line, column, count;
    };
    Wanted* const wanted = scratch<Wanted>(Scratch::kWanted, kWidest * lanes);
    int64_t count_wanted = 0;
    if (!layout.by_images()) {
      const int64_t from = p.f0 + tx * lanes;
      layout.for_each_run(from, std::min(p.f1, from + size), [&](int64_t at, int64_t n, int64_t line, int64_t column, int64_t count) {
        const int64_t inside = std::min(count, x.outputs - column);
        if (line < y.outputs && inside > 0) wanted[count_wanted++] = {at, n, line, column, inside};
      });
    }
    args.out = sums;
    tile_in_runs(tile, size, args, entries, nothing_ahead);
    for (int64_t row = args.first; row < args.last; ++row) {
      const float* const sum = sums + (row - args.first) * size;
      if (layout.by_images()) {
        for (int64_t r = 0; r < tile_rows; ++r) {
          const float* const line = sum + r * tile_columns * lanes;
          for (int64_t n = 0; n < p.images; ++n) results.write(line + n, lanes, tile_columns, p.n0 + n, row, p.y0 + ty + r, p.x0 + tx);
        }
      } else {
        for (const Wanted* w = wanted; w < wanted + count_wanted; ++w)
          results.write(sum + w->at, 1, w->count, w->n, row, w->line, w->column);
      }
    }
  };
  const auto run = [&](const Layout::Piece& p, int64_t group, int64_t first, int64_t last) {
    float* const packed = scratch(Scratch::kPacked, layout.packed());
    layout.pack(in, group * group_channels, p, packed);
    TileArgs args{};
    args.in_row = layout.row();
    args.offsets = offsets;
    args.values = entries.values;
    args.first = first;
    args.last = last;
    args.bias = epilogue.bias;
    const Tiling tiles(layout.height(p), layout.width(p), std::max(all_y.in_step, all_x.in_step));
    layout.for_each_tile(p, tiles, [&](int64_t tile_rows, int64_t tile_columns, int64_t ty, int64_t tx) {
      args.in = packed + ty * layout.row() + tx * lanes;
      for (const Pass& pass : passes) run_tile(pass, p, args, tile_rows, tile_columns, ty, tx);
    });
  };
  for_each(machine, tasks * shares, work, [&](int64_t task) {
    const int64_t share = task % shares, group = task / shares % shape.groups, begin = task / shares / shape.groups * together;
    const int64_t first = group * group_rows + group_rows * share / shares, last = group * group_rows + group_rows * (share + 1) / shares;
    for (int64_t i = begin; i < std::min(layout.pieces(), begin + together); ++i) run(layout.piece(i), group, first, last);
    if (streams) order_streams();
  });
}

// out = conv2d(in, weight), and the epilogue. `entries` has a row for each output channel.
template <class T>
void sparse_conv(const Machine& machine, const ConvShape& shape, const Entries& entries, const Images<const T>& in,
                 const Epilogue<Images<const T>>& epilogue, const Images<T>& out) {
  conv_passes<T>(machine, shape, forward_passes(shape, entries), shape.in_channels, entries, entries.count(1), in, epilogue, out);
}

// The gradient with respect to the input, and the epilogue. `entries` has a row for each input channel.
template <class T>
void sparse_conv_input_grad(const Machine& machine, const ConvShape& shape, const Entries& entries, const Images<const T>& grad,
                            const Epilogue<Images<const T>>& epilogue, const Images<T>& out) {
  const std::vector<Pass> passes = backward_passes(shape, entries);
  conv_passes<T>(machine, shape, passes, shape.out_channels, entries, entries.count(shape.passes()), grad, epilogue, out);
}

// The gradient with respect to the kept weights: `out` is [output channels][input channels of a group][taps], 0 at the others. `entries`
// has a row for each output channel.
template <class T>
void sparse_conv_weight_grad(const Machine& machine, const ConvShape& shape, const Entries& entries, const Images<const T>& in,
                             const Images<const T>& grad, float* out) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t lanes = s2ap::lanes(machine.isa);
  const int64_t group_rows = shape.out_channels / shape.groups, group_channels = shape.in_channels / shape.groups;
  const Axis y = forward_axis(shape, 0), x = forward_axis(shape, 1);
  const Layout layout(y, x, shape.batch, group_channels, lanes);
  check_packed(layout.packed());
  const int64_t count = entries.count(1);
  const int32_t* const offsets = place(machine, shape, {{y, x, entries.starts}}, entries, count, layout.channel(),
                                       [&](int64_t dy, int64_t dx) { return layout.offset(dy, dx); });
  // So many partial sums of each value, whatever the number of threads. Pieces go to them in turn, a contiguous range to each.
  const int64_t pieces = layout.pieces(), parts = std::min<int64_t>(pieces, 8);
  const int64_t shares = std::clamp<int64_t>(8 / (parts * shape.groups), 1, std::max<int64_t>(1, group_rows / 8));
  float* const partial = scratch(Scratch::kPartial, parts * count);
  const int64_t work = work_of(shape.batch * y.outputs * x.outputs, shape.out_channels, shape.in_channels, count);

  for_each(machine, parts * shape.groups * shares, work, [&](int64_t task) {
    const int64_t share = task % shares, group = task / shares % shape.groups, part = task / shares / shape.groups;
    const int64_t first = group * group_rows + group_rows * share / shares, last = group * group_rows + group_rows * (share + 1) / shares;
    float* const packed = scratch(Scratch::kPacked, layout.packed());
    ProductArgs args{};
    args.in_row = layout.row();
    args.offsets = offsets;
    args.first = first;
    args.last = last;
    args.sums = partial + part * count;
    const auto for_each_run = [&](const auto& f) {
      for (int64_t run = 0; run < entries.runs; ++run) f(entries.starts + run * entries.rows);
    };
    for_each_run([&](const int32_t* starts) { std::fill(args.sums + starts[first], args.sums + starts[last], 0.0f); });
    for (int64_t i = pieces * part / parts; i < pieces * (part + 1) / parts; ++i) {
      const Layout::Piece p = layout.piece(i);
      layout.pack(in, group * group_channels, p, packed);
      const float* gradients = nullptr;
      if constexpr (std::is_same_v<T, float>) {
        if (layout.by_images() && grad.n == 1 && p.images == lanes) {  // as they are in memory
          gradients = grad.data + p.n0 + first * grad.c + p.y0 * grad.h + p.x0 * grad.w;
          args.channel = grad.c;
          args.row = grad.h;
          args.column = grad.w;
        }
      }
      if (gradients == nullptr) {
        args.channel = layout.by_images() ? layout.height(p) * layout.row() : layout.strip();
        args.row = layout.row();
        args.column = lanes;
        float* const copies = scratch(Scratch::kGradient, (last - first) * args.channel);
        for (int64_t row = first; row < last; ++row) layout.pack_outputs(grad, row, p, copies + (row - first) * args.channel);
        gradients = copies;
      }
      layout.for_each_tile(p, ProductTiling(layout.height(p), layout.width(p), lanes),
                           [&](int64_t rows, int64_t columns, int64_t ty, int64_t tx) {
                             args.gradient = gradients + ty * args.row + tx * args.column;
                             args.in = packed + ty * layout.row() + tx * lanes;
                             for_each_run([&](const int32_t* starts) {
                               args.starts = starts;
                               loops.products(rows, columns)(args);
                             });
                           });
    }
  });
  const int64_t row_length = group_channels * shape.taps();
  for_each(machine, entries.rows, entries.rows * row_length + count * parts, [&](int64_t row) {
    float* const to = out + row * row_length;
    std::fill_n(to, row_length, 0.0f);
    for (const int32_t *start = entries.starts + row, *end = start + entries.runs * entries.rows; start < end; start += entries.rows) {
      for (int32_t j = start[0]; j < start[1]; ++j) {
        float sum = partial[j];
        for (int64_t part = 1; part < parts; ++part) sum += partial[part * count + j];
        to[entries.columns[j]] = sum;
      }
    }
  });
}

}  // namespace s2ap

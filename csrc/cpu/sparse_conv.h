// sparse_conv: convolution with the kept weights of a layer, its gradient with respect to the input, and that with respect to those weights.
//
// What is computed is torch's conv2d with a weight most of whose entries are 0: any kernel size, stride, padding, dilation and groups, a
// linear layer being the case of one position. The kept entries come in rows, one for each output channel, as in a CSR matrix whose columns
// are flat indices into the weight of that channel (input channel, then kernel row and column).
//
// How. Nothing is skipped and nothing is looked up per position: every kept entry becomes an offset into a packed copy of the input and a value
// (tiles.h), and each tile of output positions runs through the entries of one output channel after the other. The packed copy holds a piece of
// the input that fits the second-level cache, with the padding around it as zeros, so that there are no borders. Input positions that a stride
// skips between two outputs are apart in it ("phases"), so that neighbouring outputs read neighbouring vectors whatever the stride.
//
// Vectors are made in one of two ways:
//   Images     a vector is the same position of as many images as it has lanes. Activations whose strides have the batch innermost
//              (logical shape (N, C, H, W), memory C, H, W, N) are packed and written by whole vectors.
//   Positions  a vector is consecutive positions of the padded plane, image after image: for few images, down to one, and for linear layers.
//              Those positions that are padding are computed too, and dropped.
//
// The gradient with respect to the input is the same with rows and columns of the weight exchanged. With a stride, the input's positions
// of each residue are an output of their own, that some of the kernel's entries reach ("passes").
//
// The gradient of a kept weight is a dot product over all positions and images. Slices of these are added up in a fixed order, and every output
// is one sum in a fixed order, so that the bits do not depend on the number of threads.
//
// Bytes: input read, and packed again (1 + halo) times into the cache; output written; 8 bytes for an entry and tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "../plan.h"
#include "tiles.h"

namespace s2ap {

// A convolution: sizes as torch has them. Index 0 is the vertical axis, 1 the horizontal one.
struct ConvShape {
  int64_t batch, in_channels, out_channels, groups;
  int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// A tensor of logical shape (N, C, H, W), by its strides in elements. Null data: there is none.
template <class T>
struct Images {
  T* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// The kept entries. Rows are the channels that are written, columns flat indices into (channels that are read within the group, taps).
struct Entries {
  const int32_t* starts;   // [rows + 1]
  const int32_t* columns;  // [entries], ascending within a row
  const float* values;     // [entries]; not for weight gradients
};

// What follows the sums: + bias + residual, ReLU, and 0 where `gate` is 0 or less. NaN stays. Images are of the output's size.
template <class Images>
struct Epilogue {
  const float* bias = nullptr;  // [channels]
  Images residual = {};
  bool relu = false;
  Images gate = {};
};

// Along one axis: output i of a pass is at out_first + i * out_step and reads input i * in_step + shift of each tap that reaches it.
struct Axis {
  static constexpr int64_t kUnreached = INT64_MIN;
  int64_t in_size, outputs, in_step, out_first, out_step;
  std::vector<int64_t> shifts;  // of each kernel row or column
  // Of the shifts that are there: shift = quotient * in_step + phase.
  std::vector<int64_t> phases;
  int64_t first = 0, last = 0;  // quotients

  void derive() {
    bool any = false;
    for (int64_t shift : shifts) {
      if (shift == kUnreached) continue;
      const int64_t q = quotient(shift), phase = shift - q * in_step;
      first = any ? std::min(first, q) : q;
      last = any ? std::max(last, q) : q;
      any = true;
      if (std::find(phases.begin(), phases.end(), phase) == phases.end()) phases.push_back(phase);
    }
    if (!any) phases.push_back(0);
  }
  int64_t quotient(int64_t shift) const { return shift >= 0 ? shift / in_step : -((-shift + in_step - 1) / in_step); }
  int64_t phase_index(int64_t shift) const {
    return std::find(phases.begin(), phases.end(), shift - quotient(shift) * in_step) - phases.begin();
  }
  int64_t span() const { return last - first; }
  int64_t least() const { return first * in_step; }
  int64_t most() const { return last * in_step + in_step - 1; }
};

inline Axis forward_axis(const ConvShape& s, int axis) {
  Axis a{s.in_size[axis], s.out_size[axis], s.stride[axis], 0, 1, {}, {}};
  for (int64_t k = 0; k < s.kernel[axis]; ++k) a.shifts.push_back(k * s.dilation[axis] - s.padding[axis]);
  a.derive();
  return a;
}

// The input's positions residue, residue + stride, ...
inline Axis backward_axis(const ConvShape& s, int axis, int64_t residue) {
  const int64_t stride = s.stride[axis];
  Axis a{s.out_size[axis], (s.in_size[axis] - residue + stride - 1) / stride, 1, residue, stride, {}, {}};
  for (int64_t k = 0; k < s.kernel[axis]; ++k) {
    const int64_t at = residue + s.padding[axis] - k * s.dilation[axis];
    a.shifts.push_back(at % stride == 0 ? at / stride : Axis::kUnreached);
  }
  a.derive();
  return a;
}

// f(y, x) for the passes that a gradient with respect to the input consists of.
template <class F>
void for_each_residue(const ConvShape& shape, const F& f) {
  for (int64_t y = 0; y < std::min(shape.stride[0], shape.in_size[0]); ++y) {
    for (int64_t x = 0; x < std::min(shape.stride[1], shape.in_size[1]); ++x) f(backward_axis(shape, 0, y), backward_axis(shape, 1, x));
  }
}

// Elements as they are in memory.
S2AP_INLINE float as_float(float x) { return x; }
S2AP_INLINE float as_float(uint16_t bits) { return Element<BFloat16>::widen(bits); }
S2AP_INLINE void assign(float& to, float x) { to = x; }
S2AP_INLINE void assign(uint16_t& to, float x) { to = Element<BFloat16>::narrow(x); }

// Memory of one thread that grows to what it was asked for and stays: fresh memory would cost a page fault for every 4 KB in every call.
enum class Scratch { kPacked, kResults, kGradient, kStarts, kColumns, kOffsets, kValues, kPlaces };

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

// How a pass is cut into pieces, and where everything lies in a piece's packed input.
class Layout {
 public:
  static constexpr int64_t kBudget = 56 * 1024;  // floats of a packed piece: what leaves room in the second-level cache for the rest

  Layout(const Axis& y, const Axis& x, int64_t batch, int64_t channels, int64_t lanes)
      : y_(y), x_(x), batch_(batch), channels_(channels), lanes_(lanes) {
    phases_ = static_cast<int64_t>(y.phases.size() * x.phases.size());
    by_images_ = share_of_images() >= share_of_positions();
    by_images_ ? cut_images() : cut_positions();
  }

  bool by_images() const { return by_images_; }
  int64_t lanes() const { return lanes_; }
  int64_t pieces() const { return groups_ * pieces_y_ * pieces_x_; }
  // Pieces that share the lines of memory that they are read from and written to. Pieces i * together() and on are of the same lines.
  int64_t together() const { return by_images_ ? std::min(groups_, 16 / lanes_) : 1; }
  int64_t channel() const { return phases_ * plane_; }  // floats of a channel, packed
  int64_t packed() const { return channels_ * channel() + kWidest * lanes_; }
  int64_t row() const { return pitch_ * lanes_; }

  // Offset of the input of a tap, of a channel's; kUnreached if it reaches no output.
  int64_t offset(int64_t ky, int64_t kx) const {
    const int64_t dy = y_.shifts[ky], dx = x_.shifts[kx];
    if (dy == Axis::kUnreached || dx == Axis::kUnreached) return Axis::kUnreached;
    const int64_t phase = y_.phase_index(dy) * static_cast<int64_t>(x_.phases.size()) + x_.phase_index(dx);
    return phase * plane_ + ((y_.quotient(dy) - y_.first) * pitch_ + x_.quotient(dx) - x_.first) * (by_images_ ? lanes_ : 1);
  }

  // Images: rows [y0, y1) and columns [x0, x1) of images [n0, n0 + lanes). Positions: [f0, f1) of the planes of all images.
  struct Piece {
    int64_t n0 = 0, images = 0, y0 = 0, y1 = 0, x0 = 0, x1 = 0, f0 = 0, f1 = 0;
  };
  Piece piece(int64_t i) const {
    Piece p;
    if (!by_images_) {
      p.f0 = i * strip_;
      p.f1 = std::min(positions(), p.f0 + strip_);
      return p;
    }
    p.n0 = i % groups_ * lanes_;
    p.images = std::min(lanes_, batch_ - p.n0);
    const int64_t at = i / groups_;
    p.y0 = at / pieces_x_ * rows_;
    p.y1 = std::min(y_.outputs, p.y0 + rows_);
    p.x0 = at % pieces_x_ * columns_;
    p.x1 = std::min(x_.outputs, p.x0 + columns_);
    return p;
  }

  // Copies a piece of an input's channels [first, first + channels) to `to`.
  template <class T>
  void pack(const Images<const T>& in, int64_t first, const Piece& p, float* to) const {
    for (int64_t c = 0; c < channels_; ++c) {
      const T* source = in.data + (first + c) * in.c;
      for (int64_t py : y_.phases) {
        for (int64_t px : x_.phases) {
          by_images_ ? pack_images(in, source, py, px, p, to) : pack_positions(in, source, py, px, p, to);
          to += plane_;
        }
      }
    }
  }

  // Copies a piece of what was computed, or of a gradient there, so that it lies as the inputs of offset 0 do; other positions are 0.
  template <class T>
  void pack_outputs(const Images<const T>& in, int64_t channel, const Piece& p, float* to) const {
    const T* source = in.data + channel * in.c;
    if (by_images_) {
      for (int64_t y = p.y0; y < p.y1; ++y, to += row()) {
        copy_vectors(source + p.n0 * in.n + y * in.h + p.x0 * in.w, in.n, in.w, p.images, p.x1 - p.x0, to);
      }
    } else {
      std::fill_n(to, strip_, 0.0f);
      for_each_run(p.f0, p.f1, [&](int64_t at, int64_t n, int64_t y, int64_t x, int64_t count) {
        const int64_t inside = y < y_.outputs ? std::min(count, x_.outputs - x) : 0;
        for (int64_t i = 0; i < inside; ++i) to[at + i] = as_float(source[n * in.n + y * in.h + (x + i) * in.w]);
      });
    }
  }

  // f(rows, columns, y, x): tiles that make up a piece, counted from its own first row and column. Positions: one row of vectors.
  template <class F>
  void for_each_tile(const Piece& p, const F& f) const {
    const int64_t height = by_images_ ? p.y1 - p.y0 : 1;
    const int64_t width = by_images_ ? p.x1 - p.x0 : (p.f1 - p.f0 + lanes_ - 1) / lanes_;
    const int64_t across = (width + kWidest - 1) / kWidest;
    for (int64_t y = 0; y < height;) {
      const int64_t rows = width <= kWidest / 2 && height - y >= 2 ? 2 : 1;
      for (int64_t i = 0; i < across; ++i) f(rows, width * (i + 1) / across - width * i / across, y, width * i / across);
      y += rows;
    }
  }

  // f(at, image, y, x, count) for positions [from, to): `count` neighbours of one row, the first being the at-th of the positions.
  template <class F>
  void for_each_run(int64_t from, int64_t to, const F& f) const {
    const int64_t height = y_.outputs + y_.span();
    for (int64_t at = from; at < to;) {
      const int64_t line = at / pitch_, x = at % pitch_, count = std::min(pitch_ - x, to - at);
      f(at - from, line / height, line % height, x, count);
      at += count;
    }
  }
  int64_t positions() const { return batch_ * (y_.outputs + y_.span()) * (x_.outputs + x_.span()); }
  int64_t strip() const { return strip_; }

 private:
  // Which share of the arithmetic is on outputs that are wanted, as far as the tiles are wide enough to keep the machine busy.
  double share_of_images() const {
    const auto positions = static_cast<double>(y_.outputs * x_.outputs);
    const int64_t groups = (batch_ + lanes_ - 1) / lanes_;
    return static_cast<double>(batch_) / static_cast<double>(groups * lanes_) * std::min(1.0, positions / 6);
  }
  double share_of_positions() const {
    const int64_t tile = lanes_ * std::min<int64_t>(kWidest, (positions() + lanes_ - 1) / lanes_);
    const int64_t computed = (positions() + tile - 1) / tile * tile;
    return 0.8 * static_cast<double>(batch_ * y_.outputs * x_.outputs) / static_cast<double>(computed);
  }

  void cut_images() {
    groups_ = (batch_ + lanes_ - 1) / lanes_;
    const int64_t budget = kBudget / (channels_ * phases_ * lanes_);  // vectors of a plane
    double least = INFINITY;
    for (int64_t across = 1; across <= std::max<int64_t>(1, x_.outputs / 4); ++across) {
      const int64_t columns = (x_.outputs + across - 1) / across, width = columns + x_.span();
      const int64_t fits = std::max<int64_t>(budget / width - y_.span(), 1);
      const int64_t down = (y_.outputs + std::min(fits, y_.outputs) - 1) / std::min(fits, y_.outputs);
      const int64_t rows = (y_.outputs + down - 1) / down;
      const double over = std::max(1.0, static_cast<double>((rows + y_.span()) * width) / static_cast<double>(budget));
      const double cost = over * static_cast<double>((rows + y_.span()) * width) / static_cast<double>(rows * columns);
      if (cost < least) {
        least = cost;
        rows_ = rows;
        columns_ = columns;
      }
    }
    pieces_y_ = (y_.outputs + rows_ - 1) / rows_;
    pieces_x_ = (x_.outputs + columns_ - 1) / columns_;
    pitch_ = columns_ + x_.span();
    plane_ = (rows_ + y_.span()) * pitch_ * lanes_;
  }

  void cut_positions() {
    pitch_ = x_.outputs + x_.span();
    const int64_t reach = y_.span() * pitch_ + x_.span(), tile = kWidest * lanes_;
    const int64_t all = (positions() + lanes_ - 1) / lanes_ * lanes_;
    const int64_t fits = std::max<int64_t>((kBudget / (channels_ * phases_) - reach) / tile, 1) * tile;
    strip_ = std::min(all, fits);
    pieces_x_ = (positions() + strip_ - 1) / strip_;
    plane_ = (strip_ + reach + lanes_ - 1) / lanes_ * lanes_;
  }

  // `count` vectors, `step` apart, of `images` lanes, `across` apart; the other lanes are 0.
  template <class T>
  void copy_vectors(const T* from, int64_t across, int64_t step, int64_t images, int64_t count, float* to) const {
    if (across == 1 && images == lanes_) {
      if (lanes_ == 16) return copy_whole<16>(from, step, count, to);
      if (lanes_ == 8) return copy_whole<8>(from, step, count, to);
      return copy_whole<4>(from, step, count, to);
    }
    if (images < lanes_) std::fill_n(to, count * lanes_, 0.0f);
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < count; ++i) to[i * lanes_ + n] = as_float(from[n * across + i * step]);
    }
  }
  template <int lanes, class T>
  static void copy_whole(const T* from, int64_t step, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) {
      for (int l = 0; l < lanes; ++l) to[i * lanes + l] = as_float(from[i * step + l]);
    }
  }

  // The outputs [first, first + count) whose input at the phase lies inside: [low, high).
  static void inside(const Axis& axis, int64_t phase, int64_t first, int64_t count, int64_t& low, int64_t& high) {
    const auto outputs_below = [&](int64_t position) {  // how many i have i * in_step + phase < position
      const int64_t left = position - phase;
      return left <= 0 ? -((-left) / axis.in_step) : (left + axis.in_step - 1) / axis.in_step;
    };
    low = std::clamp<int64_t>(outputs_below(0), first, first + count);
    high = std::clamp<int64_t>(outputs_below(axis.in_size), low, first + count);
  }

  template <class T>
  void pack_images(const Images<const T>& in, const T* source, int64_t py, int64_t px, const Piece& p, float* to) const {
    int64_t left, right;
    const int64_t first = p.x0 + x_.first, width = p.x1 - p.x0 + x_.span();
    inside(x_, px, first, width, left, right);
    for (int64_t y = p.y0 + y_.first; y < p.y1 + y_.last; ++y, to += row()) {
      const int64_t at = y * y_.in_step + py;
      if (at < 0 || at >= y_.in_size || left == right) {
        std::fill_n(to, width * lanes_, 0.0f);
        continue;
      }
      std::fill_n(to, (left - first) * lanes_, 0.0f);
      std::fill_n(to + (right - first) * lanes_, (first + width - right) * lanes_, 0.0f);
      const int64_t x = left * x_.in_step + px;
      copy_vectors(source + p.n0 * in.n + at * in.h + x * in.w, in.n, in.w * x_.in_step, p.images, right - left,
                   to + (left - first) * lanes_);
    }
  }

  template <class T>
  void pack_positions(const Images<const T>& in, const T* source, int64_t py, int64_t px, const Piece& p, float* to) const {
    const int64_t end = std::min(p.f0 + plane_, positions());
    std::fill_n(to, plane_, 0.0f);
    for_each_run(p.f0, end, [&](int64_t at, int64_t n, int64_t line, int64_t column, int64_t count) {
      const int64_t y = (line + y_.first) * y_.in_step + py;
      if (y < 0 || y >= y_.in_size) return;
      int64_t left, right;
      inside(x_, px, column + x_.first, count, left, right);
      float* const row = to + at - (column + x_.first);
      const int64_t step = x_.in_step;
      const T* const from = source + n * in.n + y * in.h + px * in.w;
      if (step * in.w == 1) {  // so that it vectorises
        for (int64_t i = left; i < right; ++i) row[i] = as_float(from[i]);
      } else {
        for (int64_t i = left; i < right; ++i) row[i] = as_float(from[i * step * in.w]);
      }
    });
  }

  const Axis &y_, &x_;
  int64_t batch_, channels_, lanes_, phases_;
  bool by_images_;
  int64_t groups_ = 1, pieces_y_ = 1, pieces_x_ = 1;
  int64_t rows_ = 1, columns_ = 1;  // outputs of a piece
  int64_t strip_ = 0;               // positions of a piece
  int64_t pitch_ = 0;               // vectors, or positions, from one packed row to the next
  int64_t plane_ = 0;               // floats of one phase of a channel
};

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
    for_each(machine, (all + kChunk - 1) / kChunk, all, [&](int64_t i) {
      const int64_t first = i * kChunk;
      tile_loops(machine.isa).place({kept.columns + first, std::min(kChunk, all - first), taps, channel, tap_offsets.data(), to + first});
    });
    offsets = to;

    auto* const places = scratch<int32_t>(Scratch::kPlaces, (runs + 1) * rows, slot);
    for_each(machine, rows, rows * runs * 16, [&](int64_t r) {
      const int32_t *from = kept.columns + kept.starts[r], *const end = kept.columns + kept.starts[r + 1];
      for (int64_t run = 0; run < runs; ++run) {
        from = run == 0 ? from : std::lower_bound(from, end, run * each * taps);
        places[run * rows + r] = static_cast<int32_t>(from - kept.columns);
      }
      places[runs * rows + r] = kept.starts[r + 1];
    });
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

inline PlacedEntries place_in(const Layout& layout, const Machine& machine, const Entries& entries, int64_t rows, int64_t channels,
                              const ConvShape& shape) {
  const auto offsets = offsets_of_taps(shape, [&](int64_t ky, int64_t kx) { return layout.offset(ky, kx); });
  return {machine, entries, rows, channels, offsets, layout.channel(), channels};
}

template <class T>
bool lies_as(const Images<const T>& images, const Images<T>& out) {
  return images.data == nullptr || (images.n == out.n && images.c == out.c && images.h == out.h && images.w == out.w);
}

// One pass: writes the outputs that `y` and `x` describe, for all channels.
template <class T>
void conv_pass(const Machine& machine, const ConvShape& shape, const Axis& y, const Axis& x, int64_t rows, int64_t channels,
               const Entries& entries, const Images<const T>& in, const Epilogue<Images<const T>>& epilogue, const Images<T>& out) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t lanes = s2ap::lanes(machine.isa), group_rows = rows / shape.groups, group_channels = channels / shape.groups;
  const Layout layout(y, x, shape.batch, group_channels, lanes);
  const PlacedEntries placed = place_in(layout, machine, entries, rows, group_channels, shape);
  // Where there are fewer pieces than threads can share, rows are shared out too; a piece is then packed again for each share.
  const int64_t together = layout.together(), batches = (layout.pieces() + together - 1) / together, pieces = batches * shape.groups;
  const int64_t shares = std::clamp<int64_t>(machine.threads / pieces, 1, std::max<int64_t>(1, group_rows / 8));
  const int64_t work = work_of(shape.batch * y.outputs * x.outputs, rows, channels, entries.starts[rows]);

  for_each(machine, pieces * shares, work, [&](int64_t task) {
    const int64_t share = task % shares, group = task / shares % shape.groups;
    const int64_t first = group * group_rows + group_rows * share / shares, last = group * group_rows + group_rows * (share + 1) / shares;
    float* const packed = scratch(Scratch::kPacked, layout.packed());
    const int64_t batch = task / shares / shape.groups;
    for (int64_t piece = batch * together; piece < std::min(layout.pieces(), (batch + 1) * together); ++piece) {
    const typename Layout::Piece p = layout.piece(piece);
    layout.pack(in, group * group_channels, p, packed);

    constexpr bool kFloat = std::is_same_v<T, float>;
    const Images<const T>&residual = epilogue.residual, &gate = epilogue.gate;
    const bool direct = kFloat && layout.by_images() && p.images == lanes && out.n == 1 && lies_as(residual, out) && lies_as(gate, out);
    constexpr int64_t kTogether = 16;  // rows whose results wait to be written
    layout.for_each_tile(p, [&](int64_t tile_rows, int64_t tile_columns, int64_t ty, int64_t tx) {
      const TileLoop tile = (tile_rows == 2 ? loops.two_rows[0].data() : loops.one_row[0].data())[tile_columns - 1];
      TileArgs args{};
      args.in = packed + ty * layout.row() + tx * lanes;
      args.in_row = layout.row();
      args.starts = placed.starts(0, rows);
      args.ends = placed.starts(1, rows);
      args.offsets = placed.offsets;
      args.values = placed.values;
      args.bias = epilogue.bias;
      if constexpr (kFloat) {
        if (direct) {
          const auto place = [&](const auto& images) {
            return images.data + p.n0 + first * images.c + (y.out_first + (p.y0 + ty) * y.out_step) * images.h +
                   (x.out_first + (p.x0 + tx) * x.out_step) * images.w;
          };
          args.first = first;
          args.last = last;
          args.out = place(out);
          args.out_channel = out.c;
          args.out_row = out.h * y.out_step;
          args.out_column = out.w * x.out_step;
          args.residual = residual.data ? place(residual) : nullptr;
          args.gate = gate.data ? place(gate) : nullptr;
          args.relu = epilogue.relu;
          tile(args);
          return;
        }
      }
      const int64_t size = tile_rows * tile_columns * lanes;
      float* const results = scratch(Scratch::kResults, kTogether * kWidest * lanes);
      args.out = results;
      args.out_channel = size;
      args.out_row = tile_columns * lanes;
      args.out_column = lanes;
      // `count` results of one output row; (n, oy, ox) is where the first belongs.
      const auto write = [&](int64_t row, const float* from, int64_t step, int64_t count, int64_t n, int64_t oy, int64_t ox) {
        const int64_t at_y = y.out_first + oy * y.out_step, at_x = x.out_first + ox * x.out_step;
        const auto place = [&](const auto& images) {
          return images.data ? images.data + n * images.n + row * images.c + at_y * images.h + at_x * images.w : nullptr;
        };
        const T *const other = place(residual), *const open = place(gate);
        const auto finish = [&](int64_t i, int64_t other_at, int64_t open_at) {
          float result = from[i * step];
          if (other) result += as_float(other[other_at]);
          if (epilogue.relu) result = result < 0 ? 0 : result;
          if (open) result = as_float(open[open_at]) <= 0 ? 0 : result;
          return result;
        };
        T* const to = place(out);
        const int64_t across = out.w * x.out_step;
        if (step == 1 && across == 1 && lies_as(residual, out) && lies_as(gate, out)) {  // so that it vectorises
          for (int64_t i = 0; i < count; ++i) assign(to[i], finish(i, i, i));
        } else {
          for (int64_t i = 0; i < count; ++i) {
            assign(to[i * across], finish(i, i * residual.w * x.out_step, i * gate.w * x.out_step));
          }
        }
      };
      for (args.first = first; args.first < last; args.first = args.last) {
        args.last = std::min(last, args.first + kTogether);
        tile(args);
        for (int64_t row = args.first; row < args.last; ++row) {
          const float* const result = results + (row - args.first) * size;
          if (layout.by_images()) {
            for (int64_t r = 0; r < tile_rows; ++r) {
              const float* const line = result + r * tile_columns * lanes;
              for (int64_t n = 0; n < p.images; ++n) write(row, line + n, lanes, tile_columns, p.n0 + n, p.y0 + ty + r, p.x0 + tx);
            }
          } else {
            const int64_t from = p.f0 + tx * lanes, to = std::min(p.f1, from + size);
            layout.for_each_run(from, to, [&](int64_t at, int64_t n, int64_t line, int64_t column, int64_t count) {
              if (line < y.outputs) write(row, result + at, 1, std::min(count, x.outputs - column), n, line, column);
            });
          }
        }
      }
    });
    }
  });
}

// out = conv2d(in, weight), and the epilogue. `entries` has a row for each output channel.
template <class T>
void sparse_conv(const Machine& machine, const ConvShape& shape, const Entries& entries, const Images<const T>& in,
                 const Epilogue<Images<const T>>& epilogue, const Images<T>& out) {
  const Axis y = forward_axis(shape, 0), x = forward_axis(shape, 1);
  conv_pass<T>(machine, shape, y, x, shape.out_channels, shape.in_channels, entries, in, epilogue, out);
}

// The gradient with respect to the input, and the epilogue. `entries` has a row for each input channel.
template <class T>
void sparse_conv_input_grad(const Machine& machine, const ConvShape& shape, const Entries& entries, const Images<const T>& grad,
                            const Epilogue<Images<const T>>& epilogue, const Images<T>& out) {
  for_each_residue(shape, [&](const Axis& y, const Axis& x) {
    conv_pass<T>(machine, shape, y, x, shape.in_channels, shape.out_channels, entries, grad, epilogue, out);
  });
}

// The gradient with respect to the entries' values, `sums` [entries]. `entries` has a row for each output channel.
template <class T>
void sparse_conv_weight_grad(const Machine& machine, const ConvShape& shape, const Entries& entries, const Images<const T>& in,
                             const Images<const T>& grad, float* sums) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t lanes = s2ap::lanes(machine.isa), group_rows = shape.out_channels / shape.groups, group_channels = shape.in_channels / shape.groups;
  const Axis y = forward_axis(shape, 0), x = forward_axis(shape, 1);
  const Layout layout(y, x, shape.batch, group_channels, lanes);
  const PlacedEntries placed = place_in(layout, machine, entries, shape.out_channels, group_channels, shape);
  const int64_t count = entries.starts[shape.out_channels];
  // So many partial sums of each value, whatever the number of threads. Slices go to them in turn, a contiguous range to each.
  const int64_t pieces = layout.pieces(), parts = std::min<int64_t>(pieces, 8);
  const int64_t shares = std::clamp<int64_t>(8 / (parts * shape.groups), 1, std::max<int64_t>(1, group_rows / 8));
  const auto partial = std::make_unique<float[]>(parts * count);
  const int64_t work = work_of(shape.batch * y.outputs * x.outputs, shape.out_channels, shape.in_channels, count);

  for_each(machine, parts * shape.groups * shares, work, [&](int64_t task) {
    const int64_t share = task % shares, group = task / shares % shape.groups, part = task / shares / shape.groups;
    const int64_t first = group * group_rows + group_rows * share / shares, last = group * group_rows + group_rows * (share + 1) / shares;
    float* const packed = scratch(Scratch::kPacked, layout.packed());
    for (int64_t i = pieces * part / parts; i < pieces * (part + 1) / parts; ++i) {
      const typename Layout::Piece p = layout.piece(i);
      layout.pack(in, group * group_channels, p, packed);
      DotArgs args{};
      args.rows = layout.by_images() ? p.y1 - p.y0 : 1;
      args.columns = layout.by_images() ? p.x1 - p.x0 : (p.f1 - p.f0 + lanes - 1) / lanes;
      args.a_row = args.x_row = layout.row();
      args.x = packed;
      args.offsets = placed.offsets;
      args.sums = partial.get() + part * count;
      float* const gradient = scratch(Scratch::kGradient, layout.by_images() ? args.rows * layout.row() : layout.strip());
      args.a = gradient;
      for (int64_t row = first; row < last; ++row) {
        args.first = entries.starts[row];  // forward, every tap reaches an output
        args.last = entries.starts[row + 1];
        if (args.first == args.last) continue;
        layout.pack_outputs(grad, row, p, gradient);
        loops.dots(args);
      }
    }
  });
  for_each(machine, (count + kChunk - 1) / kChunk, count * parts, [&](int64_t c) {
    for (int64_t j = c * kChunk; j < std::min(count, (c + 1) * kChunk); ++j) {
      float sum = partial[j];
      for (int64_t part = 1; part < parts; ++part) sum += partial[part * count + j];
      sums[j] = sum;
    }
  });
}

// ---- Blocks

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

// Runs of input channels whose part of a tile's inputs stays in the first-level cache, but not so short that sums are loaded and stored for
// next to nothing. `per_channel`: entries of an output channel, for each input channel.
inline int64_t channels_of_run(double per_channel, int64_t channels, const Axis& y, const Axis& x, int64_t lanes) {
  constexpr int64_t kInCache = 5 * 1024;  // floats
  constexpr double kWorthARun = 12;       // entries of an output channel
  const int64_t in_cache = kInCache / ((y.span() + 1) * (x.span() + kWidest) * lanes);
  const int64_t run = std::max({int64_t{1}, in_cache, static_cast<int64_t>(kWorthARun / std::max(per_channel, 1e-3))});
  const int64_t runs = (channels + run - 1) / run;
  return (channels + runs - 1) / runs;
}

// The outputs that `y` and `x` describe, and the entries that reach them.
struct BlockPass {
  Axis y, x;
  PlacedEntries placed;

  BlockPass(const Machine& machine, const ConvShape& shape, const Axis& y, const Axis& x, const Entries& entries,
            const Blocks<const float>& in, int64_t rows, int slot)
      : y(y), x(x), placed(place(machine, shape, y, x, entries, in, rows, slot)) {}

 private:
  static PlacedEntries place(const Machine& machine, const ConvShape& shape, const Axis& y, const Axis& x, const Entries& entries,
                             const Blocks<const float>& in, int64_t rows, int slot) {
    const auto offsets = offsets_of_taps(shape, [&](int64_t ky, int64_t kx) {
      const int64_t dy = y.shifts[ky], dx = x.shifts[kx];
      return dy == Axis::kUnreached || dx == Axis::kUnreached ? Axis::kUnreached : dy * in.row() + dx * in.lanes;
    });
    const int64_t channels = in.channels / shape.groups;
    const auto reaching = offsets.size() - std::count(offsets.begin(), offsets.end(), Axis::kUnreached);
    const double share = static_cast<double>(reaching) / static_cast<double>(offsets.size());
    const double per_channel = share * static_cast<double>(entries.starts[rows]) / static_cast<double>(rows * channels);
    return {machine, entries, rows, channels, offsets, in.channel(), channels_of_run(per_channel, channels, y, x, in.lanes), slot};
  }
};

// The outputs of several passes, which are each other's neighbours and read the same inputs: tile by tile they take turns, while both are in
// the cache.
inline void block_passes(const Machine& machine, const ConvShape& shape, const std::vector<BlockPass>& passes, int64_t entries,
                         const Blocks<const float>& in, const Epilogue<Blocks<const float>>& epilogue, const Blocks<float>& out) {
  const TileLoops& loops = tile_loops(machine.isa);
  const int64_t rows = out.channels / shape.groups, channels = in.channels / shape.groups;
  const int64_t tall = passes[0].y.outputs, wide = passes[0].x.outputs;  // the others have as many outputs or fewer
  const int64_t blocks = out.count * shape.groups;
  const int64_t pieces = std::clamp<int64_t>(machine.threads > 1 ? (8 * machine.threads + blocks - 1) / blocks : 1, 1, (tall + 1) / 2);
  const int64_t work = work_of(out.count * tall * wide * out.lanes, rows, channels, entries);
  const int64_t across = (wide + kWidest - 1) / kWidest;

  for_each(machine, blocks * pieces, work, [&](int64_t task) {
    const int64_t piece = task % pieces, group = task / pieces % shape.groups, block = task / pieces / shape.groups;
    const int64_t top = tall * piece / pieces, bottom = tall * (piece + 1) / pieces;
    TileArgs args{};
    args.first = group * rows;
    args.last = (group + 1) * rows;
    args.out_channel = out.channel();
    args.bias = epilogue.bias;
    const auto run_tile = [&](const BlockPass& pass, int64_t oy, int64_t ox, int64_t height, int64_t width) {
      const auto& [y, x, placed] = pass;
      const TileLoop tile = (height == 2 ? loops.two_rows[x.in_step - 1].data() : loops.one_row[x.in_step - 1].data())[width - 1];
      const auto place = [&](const auto& images) {
        return images.data ? images.at(block, args.first, y.out_first + oy * y.out_step, x.out_first + ox * x.out_step) : nullptr;
      };
      args.in = in.at(block, group * channels, oy * y.in_step, ox * x.in_step);
      args.in_row = y.in_step * in.row();
      args.offsets = placed.offsets;
      args.values = placed.values;
      args.out = place(out);
      args.out_row = y.out_step * out.row();
      args.out_column = x.out_step * out.lanes;
      for (int64_t run = 0; run < placed.runs; ++run) {
        const bool last = run + 1 == placed.runs;
        args.starts = placed.starts(run, out.channels);
        args.ends = placed.starts(run + 1, out.channels);
        args.resume = run > 0;
        args.residual = last ? place(epilogue.residual) : nullptr;
        args.relu = last && epilogue.relu;
        args.gate = last ? place(epilogue.gate) : nullptr;
        tile(args);
      }
    };
    for (int64_t oy = top, height; oy < bottom; oy += height) {
      height = wide <= kWidest / 2 && bottom - oy >= 2 ? 2 : 1;
      for (int64_t i = 0; i < across; ++i) {
        const int64_t ox = wide * i / across, width = wide * (i + 1) / across - ox;
        const Axis& y = passes[0].y;
        if (oy + height < bottom) {  // the rows that the tile below this one reads beyond those of this one
          const int64_t below = std::max(oy * y.in_step + y.most() + 1, (oy + height) * y.in_step + y.least());
          for (int64_t c = group * channels; c < (group + 1) * channels; ++c) {
            for (int64_t row = below; row <= (oy + 2 * height - 1) * y.in_step + y.most() && row < in.height; ++row) {
              const float* const later = in.at(block, c, row, ox * passes[0].x.in_step);
              for (int64_t k = 0; k < width * passes[0].x.in_step * in.lanes; k += 16) __builtin_prefetch(later + k, 0, 2);
            }
          }
        }
        for (const BlockPass& pass : passes) {
          const int64_t tile_rows = std::min(height, pass.y.outputs - oy), tile_columns = std::min(width, pass.x.outputs - ox);
          if (tile_rows > 0 && tile_columns > 0) run_tile(pass, oy, ox, tile_rows, tile_columns);
        }
      }
    }
  });
}

inline void sparse_conv(const Machine& machine, const ConvShape& shape, const Entries& entries, const Blocks<const float>& in,
                        const Epilogue<Blocks<const float>>& epilogue, const Blocks<float>& out) {
  const std::vector<BlockPass> passes{{machine, shape, forward_axis(shape, 0), forward_axis(shape, 1), entries, in, out.channels, 0}};
  block_passes(machine, shape, passes, entries.starts[out.channels], in, epilogue, out);
}

inline void sparse_conv_input_grad(const Machine& machine, const ConvShape& shape, const Entries& entries, const Blocks<const float>& grad,
                                   const Epilogue<Blocks<const float>>& epilogue, const Blocks<float>& out) {
  std::vector<BlockPass> passes;
  for_each_residue(shape, [&](const Axis& y, const Axis& x) {
    passes.emplace_back(machine, shape, y, x, entries, grad, out.channels, static_cast<int>(passes.size()));
  });
  block_passes(machine, shape, passes, entries.starts[out.channels], grad, epilogue, out);
}

}  // namespace s2ap

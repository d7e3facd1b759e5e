// The packed input of a sparse convolution: how the outputs are cut into pieces whose inputs fit the second-level cache, how those inputs
// are copied there, with the padding as zeros, and how a piece is cut into tiles. sparse_conv.h says what for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "element.h"
#include "sparse_entries.h"
#include "sparse_shape.h"
#include "tiles.h"

namespace s2ap {

// Elements as they are in memory.
S2AP_INLINE float as_float(float x) { return x; }
S2AP_INLINE float as_float(uint16_t bits) { return Element<BFloat16>::widen(bits); }
S2AP_INLINE void assign(float& to, float x) { to = x; }
S2AP_INLINE void assign(uint16_t& to, float x) { to = Element<BFloat16>::narrow(x); }

// How a pass is cut into pieces, and where everything lies in a piece's packed input.
class Layout {
 public:
  Layout(const Axis& y, const Axis& x, int64_t batch, int64_t channels, int64_t lanes)
      : y_(y), x_(x), batch_(batch), channels_(channels), lanes_(lanes) {
    phases_ = static_cast<int64_t>(y.phases.size() * x.phases.size());
    budget_ = (lanes == 16 ? 160 : 56) * 1024;  // where vectors have 16 lanes the second-level cache holds 1 MB or more
    by_images_ = share_of_images() >= share_of_positions();
    by_images_ ? cut_images() : cut_positions();
  }

  bool by_images() const { return by_images_; }
  int64_t pieces() const { return groups_ * pieces_y_ * pieces_x_; }
  // Pieces that share the lines of memory that they are read from and written to. Pieces i * together() and on are of the same lines.
  int64_t together() const { return by_images_ ? std::min(groups_, 16 / lanes_) : 1; }
  int64_t channel() const { return phases_ * plane_; }  // floats of a channel, packed
  int64_t packed() const { return channels_ * channel() + kWidest * lanes_; }
  int64_t row() const { return pitch_ * lanes_; }
  // Offset of the input of a tap with these shifts, of a channel's.
  int64_t offset(int64_t dy, int64_t dx) const {
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
    int64_t phase = 0;
    for (int64_t py : y_.phases) {
      for (int64_t px : x_.phases) {
        by_images_ ? pack_images(in, first, py, px, p, to + phase * plane_) : pack_positions(in, first, py, px, p, to + phase * plane_);
        ++phase;
      }
    }
  }

  // Copies a piece of what was computed, or of a gradient there, so that it lies as the inputs of offset 0 do; other positions are 0.
  template <class T>
  void pack_outputs(const Images<const T>& in, int64_t channel, const Piece& p, float* to) const {
    const T* source = in.data + channel * in.c;
    if (by_images_) {
      for (int64_t y = p.y0; y < p.y1; ++y, to += row()) {
        const T* const from = source + p.n0 * in.n + y * in.h + p.x0 * in.w;
        ask_for_vectors(from + kChannelsAhead * in.c, in.n, in.w, p.x1 - p.x0);
        copy_vectors(from, in.n, in.w, p.images, p.x1 - p.x0, to);
      }
    } else {
      std::fill_n(to, strip_, 0.0f);
      for_each_run(p.f0, p.f1, [&](int64_t at, int64_t n, int64_t y, int64_t x, int64_t count) {
        const int64_t inside = y < y_.outputs ? std::min(count, x_.outputs - x) : 0;
        for (int64_t i = 0; i < inside; ++i) to[at + i] = as_float(source[n * in.n + y * in.h + (x + i) * in.w]);
      });
    }
  }

  // A piece's vectors: of images, rows and columns of outputs; of positions, one row.
  int64_t height(const Piece& p) const { return by_images_ ? p.y1 - p.y0 : 1; }
  int64_t width(const Piece& p) const { return by_images_ ? p.x1 - p.x0 : (p.f1 - p.f0 + lanes_ - 1) / lanes_; }

  // f(rows, columns, y, x): tiles that make up a piece, counted from its own first row and column.
  template <class Tiles, class F>
  void for_each_tile(const Piece& p, const Tiles& tiles, const F& f) const {
    for (int64_t y = 0, rows; y < height(p); y += rows) {
      rows = tiles.rows(height(p) - y);
      for (int64_t i = 0; i < tiles.across; ++i) {
        const int64_t x = width(p) * i / tiles.across;
        f(rows, width(p) * (i + 1) / tiles.across - x, y, x);
      }
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
  // Positions of all images' planes; and up to the last one that is an output.
  int64_t planes() const { return batch_ * (y_.outputs + y_.span()) * (x_.outputs + x_.span()); }
  int64_t positions() const { return planes() - y_.span() * (x_.outputs + x_.span()) - x_.span(); }
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
    const int64_t budget = budget_ / (channels_ * phases_ * lanes_);  // vectors of a plane
    constexpr int64_t kFewest = 4;  // rows: with fewer, more is packed twice than a piece beyond its budget costs
    double least = INFINITY;
    for (int64_t across = 1; across <= std::max<int64_t>(1, x_.outputs / 4); ++across) {
      const int64_t columns = (x_.outputs + across - 1) / across, width = columns + x_.span();
      const int64_t fits = std::max(budget / width - y_.span(), kFewest);
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
    const int64_t fits = std::max<int64_t>((budget_ / (channels_ * phases_) - reach) / tile, 1) * tile;
    strip_ = std::min(all, fits);
    pieces_x_ = (positions() + strip_ - 1) / strip_;
    plane_ = (strip_ + reach + lanes_ - 1) / lanes_ * lanes_;
  }

  // What a later channel copies from its `from`: few vectors that lie far apart, which the machine does not foresee by itself.
  template <class T>
  static void ask_for_vectors(const T* from, int64_t across, int64_t step, int64_t count) {
    if (across != 1) return;
    for (int64_t i = 0; i < count; ++i) ask_for(from + i * step);
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

  // One phase of all channels, from the first one's place on.
  template <class T>
  void pack_images(const Images<const T>& in, int64_t channel, int64_t py, int64_t px, const Piece& p, float* packed) const {
    int64_t left, right;
    const int64_t first = p.x0 + x_.first, width = p.x1 - p.x0 + x_.span();
    inside(x_, px, first, width, left, right);
    for (int64_t c = 0; c < channels_; ++c) {
      float* to = packed + c * this->channel();
      for (int64_t y = p.y0 + y_.first; y < p.y1 + y_.last; ++y, to += row()) {
        const int64_t at = y * y_.in_step + py;
        if (at < 0 || at >= y_.in_size || left == right) {
          std::fill_n(to, width * lanes_, 0.0f);
          continue;
        }
        std::fill_n(to, (left - first) * lanes_, 0.0f);
        std::fill_n(to + (right - first) * lanes_, (first + width - right) * lanes_, 0.0f);
        const T* const from = in.data + (channel + c) * in.c + p.n0 * in.n + at * in.h + (left * x_.in_step + px) * in.w;
        ask_for_vectors(from + kChannelsAhead * in.c, in.n, in.w * x_.in_step, right - left);
        copy_vectors(from, in.n, in.w * x_.in_step, p.images, right - left, to + (left - first) * lanes_);
      }
    }
  }

  template <class T>
  void pack_positions(const Images<const T>& in, int64_t channel, int64_t py, int64_t px, const Piece& p, float* packed) const {
    struct Inside {  // neighbours in a row that are no padding
      int64_t to, from, count;
    };
    auto* const found = scratch<Inside>(Scratch::kInside, plane_);  // the same for all channels
    int64_t rows = 0;
    const int64_t step = x_.in_step * in.w;
    for_each_run(p.f0, std::min(p.f0 + plane_, planes()), [&](int64_t at, int64_t n, int64_t line, int64_t column, int64_t count) {
      const int64_t y = (line + y_.first) * y_.in_step + py;
      if (y < 0 || y >= y_.in_size) return;
      int64_t left, right;
      inside(x_, px, column + x_.first, count, left, right);
      if (left < right) found[rows++] = {at + left - (column + x_.first), n * in.n + y * in.h + px * in.w + left * step, right - left};
    });
    for (int64_t c = 0; c < channels_; ++c) {
      const T* const source = in.data + (channel + c) * in.c;
      float* const to = packed + c * this->channel();
      std::fill_n(to, plane_, 0.0f);
      for (const Inside* row = found; row < found + rows; ++row) {
        if (step == 1) {  // so that it vectorises
          for (int64_t i = 0; i < row->count; ++i) to[row->to + i] = as_float(source[row->from + i]);
        } else {
          for (int64_t i = 0; i < row->count; ++i) to[row->to + i] = as_float(source[row->from + i * step]);
        }
      }
    }
  }

  static constexpr int64_t kChannelsAhead = 3;

  const Axis &y_, &x_;
  int64_t batch_, channels_, lanes_, phases_;
  int64_t budget_;  // floats of a packed piece: what leaves room in the second-level cache for the rest
  bool by_images_;
  int64_t groups_ = 1, pieces_y_ = 1, pieces_x_ = 1;
  int64_t rows_ = 1, columns_ = 1;  // outputs of a piece
  int64_t strip_ = 0;               // positions of a piece
  int64_t pitch_ = 0;               // vectors, or positions, from one packed row to the next
  int64_t plane_ = 0;               // floats of one phase of a channel
};

}  // namespace s2ap

// What a sparse convolution is of: sizes, activations, kept entries, and along each axis which inputs an output reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace s2ap {

// A convolution: sizes as torch has them. Index 0 is the vertical axis, 1 the horizontal one.
struct ConvShape {
  int64_t batch, in_channels, out_channels, groups;
  int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t activations() const {  // elements that are read and written
    return batch * (in_channels * in_size[0] * in_size[1] + out_channels * out_size[0] * out_size[1]);
  }
  int64_t passes() const { return stride[0] * stride[1]; }  // of the gradient with respect to the input, one for each residue
};

// A tensor of logical shape (N, C, H, W), by its strides in elements. Null data: there is none.
template <class T>
struct Images {
  T* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// The kept entries, part after part (sparse_pattern.h): `runs` of the channels that are read, and for the gradient with respect to the
// input so many for each pass. Rows are the channels that are written, columns flat indices into (channels that are read within the group,
// taps).
struct Entries {
  const int32_t* starts;   // [parts * rows + 1]
  const int32_t* columns;  // [entries], ascending within a row of a part
  const float* values;     // [entries]; not for weight gradients
  int64_t rows, runs;

  // Where the rows of a pass start, run after run.
  const int32_t* pass(int64_t pass) const { return starts + pass * runs * rows; }
  int64_t count(int64_t passes) const { return starts[passes * runs * rows]; }
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

// An axis for all that several read, as far as the inputs are concerned; with the outputs of the one that has most. They have one in_step.
inline void extend(Axis& axis, const Axis& other) {
  axis.outputs = std::max(axis.outputs, other.outputs);
  axis.first = std::min(axis.first, other.first);
  axis.last = std::max(axis.last, other.last);
}

// f(tap, shift along y, shift along x) for the taps that reach an output.
template <class F>
void for_each_tap(const ConvShape& shape, const Axis& y, const Axis& x, const F& f) {
  for (int64_t tap = 0; tap < shape.taps(); ++tap) {
    const int64_t dy = y.shifts[tap / shape.kernel[1]], dx = x.shifts[tap % shape.kernel[1]];
    if (dy != Axis::kUnreached && dx != Axis::kUnreached) f(tap, dy, dx);
  }
}

// f(pass, y, x) for the passes that a gradient with respect to the input consists of.
template <class F>
void for_each_residue(const ConvShape& shape, const F& f) {
  for (int64_t y = 0; y < std::min(shape.stride[0], shape.in_size[0]); ++y) {
    for (int64_t x = 0; x < std::min(shape.stride[1], shape.in_size[1]); ++x) {
      f(y * shape.stride[1] + x, backward_axis(shape, 0, y), backward_axis(shape, 1, x));
    }
  }
}

// The one of these passes that a tap's entries belong to, for all taps.
inline std::vector<int64_t> passes_of_taps(const ConvShape& shape) {
  const auto residue = [&](int axis, int64_t k) {
    const int64_t stride = shape.stride[axis];
    return ((k * shape.dilation[axis] - shape.padding[axis]) % stride + stride) % stride;
  };
  std::vector<int64_t> passes;
  for (int64_t ky = 0; ky < shape.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < shape.kernel[1]; ++kx) passes.push_back(residue(0, ky) * shape.stride[1] + residue(1, kx));
  }
  return passes;
}

}  // namespace s2ap

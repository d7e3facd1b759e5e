// What the ops of the sparse convolutions have in common: the arguments that say which convolution it is, checked.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "sparse_shape.h"
#include "torch_binding.h"

namespace s2ap {

using Ints = std::vector<int64_t>;

struct ConvArguments {
  const Ints &kernel, &stride, &padding, &dilation;
  int64_t groups;
};

// Whether the product of sizes, none of them negative, is larger than `most`. It may be larger than any integer.
inline bool exceeds(std::initializer_list<int64_t> sizes, int64_t most) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return false;
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (product > most / size) return true;
    product *= size;
  }
  return false;
}

// What sizes are allowed to be. Sums and products of a few of them do not overflow then, nor do 32-bit offsets of what is packed.
constexpr int64_t kMostSize = INT32_MAX;  // any size or setting by itself, and the positions of an image with its padding
constexpr int64_t kMostTaps = (1 << 16) - 1;
constexpr int64_t kMostTapsOfPasses = 1 << 26;  // taps, times the passes of the gradient with respect to the input

inline int64_t checked_size(int64_t size, Argument name, int64_t least = 0) {
  if (size < least || size > kMostSize) {
    fail(name, "numbers in [" + std::to_string(least) + ", 2**31)", std::to_string(size));
  }
  return size;
}

// The shape of a convolution, sizes of activations being left open.
inline ConvShape conv_shape(const ConvArguments& c) {
  ConvShape s{};
  s.groups = checked_size(c.groups, "groups", 1);
  const auto numbers = [](const Ints& given, const char* name, int64_t least, int64_t (&to)[2]) {
    if (given.size() != 2) fail(name, "two numbers", std::to_string(given.size()));
    for (int axis = 0; axis < 2; ++axis) to[axis] = checked_size(given[axis], name, least);
  };
  numbers(c.kernel, "kernel", 1, s.kernel);
  numbers(c.stride, "stride", 1, s.stride);
  numbers(c.padding, "padding", 0, s.padding);
  numbers(c.dilation, "dilation", 1, s.dilation);
  if (s.taps() > kMostTaps) fail("kernel", "fewer than 2**16 positions", std::to_string(s.taps()));
  if (exceeds({s.taps(), s.passes()}, kMostTapsOfPasses)) {
    fail("stride", "at most 2**26 for the product of kernel and stride", std::to_string(s.taps()) + " * " + std::to_string(s.passes()));
  }
  return s;
}

}  // namespace s2ap

// What the ops of the sparse convolutions have in common: the arguments that say which convolution it is, checked.
#pragma once

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

// The shape of a convolution, sizes of activations being left open.
inline ConvShape conv_shape(const ConvArguments& c) {
  ConvShape s{};
  s.groups = c.groups;
  const auto numbers = [](const Ints& given, const char* name, int64_t least, int64_t (&to)[2]) {
    for (int axis = 0; axis < 2; ++axis) {
      if (given.size() != 2 || given[axis] < least) fail(name, "two numbers of at least " + std::to_string(least), "others");
      to[axis] = given[axis];
    }
  };
  numbers(c.kernel, "kernel", 1, s.kernel);
  numbers(c.stride, "stride", 1, s.stride);
  numbers(c.padding, "padding", 0, s.padding);
  numbers(c.dilation, "dilation", 1, s.dilation);
  return s;
}

}  // namespace s2ap

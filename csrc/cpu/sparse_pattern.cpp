// The op s2ap::sparse_pattern on the CPU. The kernel is in sparse_pattern.h.
#include "sparse_pattern.h"

#include <optional>
#include <tuple>

#include "sparse_binding.h"

namespace s2ap {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_pattern_cpu(const Tensor& weight, const std::optional<Tensor>& mask,
                                                                      const Ints& kernel, const Ints& stride, const Ints& padding,
                                                                      const Ints& dilation, int64_t groups) {
  if (weight.dim() < 2) fail("weight", "a tensor of 2 or more dimensions", std::to_string(weight.dim()));
  const int64_t n = weight.numel();
  for (int64_t axis = 0; axis < weight.dim(); ++axis) checked_size(weight.size(axis), "weight");
  check_tensor(weight, "weight", weight.scalar_type(), n);
  if (mask) check_tensor(*mask, "mask", ScalarType::Bool, n);
  if (n > INT32_MAX) fail("weight", "fewer than 2**31 elements", std::to_string(n));
  const ConvShape conv = conv_shape({kernel, stride, padding, dilation, groups});
  if (weight.size(0) % groups) fail("groups", "a divisor of " + std::to_string(weight.size(0)), std::to_string(groups));
  if (exceeds({weight.size(0), weight.size(1), conv.taps()}, n) || n != weight.size(0) * weight.size(1) * conv.taps()) {
    fail("kernel", "the size of the weight's", std::to_string(conv.taps()) + " elements");
  }
  if (exceeds({groups, weight.size(1), conv.passes()}, kMostSize)) {
    fail("stride", "fewer than 2**31 rows of inputs", std::to_string(conv.passes()) + " residues of each input");
  }
  const WeightShape shape{weight.size(0), weight.size(1), conv.taps(), groups, conv.passes(), passes_of_taps(conv)};

  const auto empty = [&](int64_t size) { return torch::stable::new_empty(weight, {size}, ScalarType::Int); };
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const Machine machine = torch_machine();
  Tensor starts, columns, input_starts, input_columns, order;
  const auto make = [&](const auto& kept) {
    const PatternLists lists(machine, shape, kept);
    starts = empty(lists.rows() + 1);
    input_starts = empty(lists.input_rows() + 1);
    for (Tensor* list : {&columns, &input_columns, &order}) *list = empty(lists.entries());
    lists.write(kept, ints(starts), ints(columns), ints(input_starts), ints(input_columns), ints(order));
  };
  if (mask) {
    const auto* m = static_cast<const uint8_t*>(mask->const_data_ptr());  // a view of other bytes as bool may hold any
    make([m](int64_t i) { return m[i] != 0; });
  } else {
    const auto make_of = [&](auto bits) {  // one for both types of 16 bits
      using Bits = decltype(bits);
      const auto* w = static_cast<const Bits*>(weight.const_data_ptr());
      make([w](int64_t i) { return (w[i] & kMagnitude<Bits>) != 0; });
    };
    dispatch(weight, "weight", [&](auto element) { make_of(BitsOf<decltype(element)>{}); });
  }
  return {starts, columns, input_starts, input_columns, order};
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) { m.impl("sparse_pattern", TORCH_BOX(&s2ap::sparse_pattern_cpu)); }

// The ops s2ap::sparse_conv, sparse_conv_input_grad and sparse_conv_weight_grad on the CPU. The kernels are in sparse_conv.h.
#include "sparse_conv.h"

#include <optional>

#include "sparse_blocks.h"
#include "sparse_binding.h"

namespace s2ap {

using MaybeTensor = std::optional<Tensor>;

// Sizes of an activation, as images (N, C, H, W) or as blocks.
struct ActivationSize {
  int64_t batch, channels, size[2];
};

inline ActivationSize size_of(const Tensor& t, const char* name, int64_t halo) {
  if (t.dim() != 4 && t.dim() != 5) fail(name, "4 dimensions, or 5 of blocks", std::to_string(t.dim()));
  for (int64_t axis = 0; axis < t.dim(); ++axis) checked_size(t.size(axis), name);
  if (t.dim() == 4) return {t.size(0), t.size(1), {t.size(2), t.size(3)}};
  if (std::min(t.size(2), t.size(3)) < 2 * halo) fail(name, "a halo of " + std::to_string(halo) + " all around", "less");
  return {checked_size(t.size(0) * t.size(4), name), t.size(1), {t.size(2) - 2 * halo, t.size(3) - 2 * halo}};
}

inline ConvShape conv_shape(const Tensor& in, const char* in_name, const Tensor& out, const char* out_name, int64_t halo,
                            const ConvArguments& convolution) {
  checked_size(halo, "halo");
  const ActivationSize input = size_of(in, in_name, halo), output = size_of(out, out_name, halo);
  ConvShape s = conv_shape(convolution);
  s.batch = input.batch;
  s.in_channels = input.channels;
  s.out_channels = output.channels;
  for (int axis = 0; axis < 2; ++axis) {
    s.in_size[axis] = input.size[axis];
    s.out_size[axis] = output.size[axis];
    const int64_t left = input.size[axis] + 2 * s.padding[axis] - s.dilation[axis] * (s.kernel[axis] - 1) - 1;
    const int64_t expected = left < 0 ? 0 : left / s.stride[axis] + 1;
    if (output.size[axis] != expected) {
      fail(out_name, "size " + std::to_string(expected) + " along axis " + std::to_string(2 + axis), std::to_string(output.size[axis]));
    }
  }
  if (exceeds({input.size[0] + 2 * s.padding[0], input.size[1] + 2 * s.padding[1]}, kMostSize)) {
    fail("padding", "fewer than 2**31 positions in a padded image",
         std::to_string(input.size[0]) + " + 2 * " + std::to_string(s.padding[0]) + " by " + std::to_string(input.size[1]) + " + 2 * " +
             std::to_string(s.padding[1]));
  }
  if (output.batch != input.batch) fail(out_name, "a batch of " + std::to_string(input.batch), std::to_string(output.batch));
  if (s.in_channels % s.groups || s.out_channels % s.groups) {
    fail("groups", "a divisor of both numbers of channels", std::to_string(s.groups));
  }
  return s;
}

// Every column decides where an op reads or writes, so each is looked at, in every call: a fraction of what finding their inputs takes
// (place). Of a pass there are only taps that belong to it; otherwise they would read beyond what it reaches. That columns ascend is not
// looked at, for nothing but the order of the sums depends on it.
inline void check_columns(const int32_t* columns, int64_t count, int64_t row_length) {
  uint32_t largest = 0;  // which a negative one is
  for (int64_t j = 0; j < count; ++j) largest = std::max(largest, static_cast<uint32_t>(columns[j]));
  if (count > 0 && largest >= row_length) {
    fail("columns", "numbers in [0, " + std::to_string(row_length) + ")", std::to_string(static_cast<int32_t>(largest)));
  }
}

inline void check_passes(const ConvShape& shape, const Entries& entries) {
  const int64_t passes = shape.passes(), taps = shape.taps();
  if (passes == 1) return;
  const std::vector<int64_t> pass_of_tap = passes_of_taps(shape);
  const uint64_t part = ((uint64_t{1} << 32) + taps - 1) / taps;  // a division for each entry would be slow; exact as in place
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t j = entries.count(pass); j < entries.count(pass + 1); ++j) {
      const int64_t tap = entries.columns[j] - static_cast<int64_t>(entries.columns[j] * part >> 32) * taps;
      if (pass_of_tap[tap] != pass) {
        fail("columns", "kernel positions of pass " + std::to_string(pass_of_tap[tap]) + " in that pass",
             std::to_string(entries.columns[j]) + " in pass " + std::to_string(pass));
      }
    }
  }
}

// The entries, checked: so many rows in each part, starts that ascend from 0 to the number of entries, columns below inputs * taps.
inline Entries entries_of(const Tensor& starts, const Tensor& columns, const Tensor* values, int64_t rows, int64_t inputs, int64_t taps,
                          int64_t passes) {
  const int64_t row_length = inputs * taps;
  if (exceeds({row_length, taps}, UINT32_MAX)) fail("columns", "rows of fewer than 2**32 / taps columns", std::to_string(row_length));
  const int64_t in_pass = rows * passes, parts = starts.numel() - 1;
  if (parts < 0 || (in_pass == 0 ? parts != 0 : parts == 0 || parts % in_pass)) {
    fail("starts", "1 and a multiple of " + std::to_string(in_pass) + " elements", std::to_string(starts.numel()));
  }
  check_tensor(starts, "starts", ScalarType::Int, starts.numel());
  const auto* start = static_cast<const int32_t*>(starts.const_data_ptr());
  check_tensor(columns, "columns", ScalarType::Int, columns.numel());
  if (start[0] != 0 || start[parts] != columns.numel()) {
    fail("starts", "0 to " + std::to_string(columns.numel()), std::to_string(start[0]) + " to " + std::to_string(start[parts]));
  }
  for (int64_t r = 0; r < parts; ++r) {
    if (start[r] > start[r + 1]) {
      fail("starts", "none below the one before it", std::to_string(start[r + 1]) + " after " + std::to_string(start[r]));
    }
  }
  const auto* column = static_cast<const int32_t*>(columns.const_data_ptr());
  check_columns(column, columns.numel(), row_length);
  if (values) check_tensor(*values, "values", ScalarType::Float, columns.numel());
  const auto* const value = values ? static_cast<const float*>(values->const_data_ptr()) : nullptr;
  return {start, column, value, rows, in_pass == 0 ? 1 : parts / in_pass};
}

template <class T>
Images<T> images_of(const Tensor& t) {
  using Bare = std::remove_const_t<T>;
  return {static_cast<Bare*>(const_cast<void*>(t.const_data_ptr())), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <class T>
Blocks<T> blocks_of(const Tensor& t, int64_t halo) {
  return {static_cast<float*>(const_cast<void*>(t.const_data_ptr())),
          t.size(0),
          t.size(1),
          t.size(2) - 2 * halo,
          t.size(3) - 2 * halo,
          halo,
          t.size(4)};
}

inline void check_like(const MaybeTensor& t, const char* name, const Tensor& like) {
  if (!t) return;
  check_memory(*t, name);
  bool same = t->dim() == like.dim() && t->scalar_type() == like.scalar_type();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = t->size(i) == like.size(i);
  if (!same) fail(name, "a tensor of the size and dtype of out", "another");
}

// Runs f with activations as images of their element type, or g with them as blocks.
template <class F, class G>
void by_layout(const Tensor& in, const char* name, const Tensor& out, const MaybeTensor& residual, const MaybeTensor& gate,
               const ConvShape& shape, int64_t halo, const F& f, const G& g) {
  check_like(residual, "residual", out);
  check_like(gate, "gate", out);
  check_memory(in, name);
  check_memory(out, "out");
  if (in.scalar_type() != out.scalar_type() || in.dim() != out.dim()) {
    fail(name, "a CPU tensor of the dtype and the layout of out", "another");
  }
  if (out.numel() == 0) return;
  if (in.numel() == 0) fail(name, "an element or more", "none");
  if (in.dim() == 4) {
    if (in.scalar_type() == ScalarType::Float) return f(float{});
    if (in.scalar_type() == ScalarType::BFloat16) return f(uint16_t{});
    fail(name, "float32 or bfloat16", toString(in.scalar_type()));
  }
  const int64_t lanes = s2ap::lanes(best_isa());
  if (in.scalar_type() != ScalarType::Float || in.size(4) != lanes || out.size(4) != lanes) {
    fail(name, "float32 blocks of " + std::to_string(lanes) + " images", "others");
  }
  const int64_t reached = in.size(1) / shape.groups * in.size(2) * in.size(3) * lanes;  // by an entry's offset
  if (reached >= INT64_C(1) << 31) fail(name, "fewer than 2**31 elements in a group's channels of a block", std::to_string(reached));
  const auto check = [](const Tensor& t, const char* what) {
    if (!t.is_contiguous()) fail(what, "contiguous blocks", "strided ones");
  };
  check(in, name);
  check(out, "out");
  if (residual) check(*residual, "residual");
  if (gate) check(*gate, "gate");
  if (std::max(shape.stride[0], shape.stride[1]) > 2) fail("stride", "at most 2 for blocks", "more");
  g();
}

inline void check_reach(const Axis& y, const Axis& x, int64_t halo) {
  if (!reaches(y, halo) || !reaches(x, halo)) fail("halo", "zeros as far as the kernel reaches", std::to_string(halo));
}

// `out` is written, and so has memory of its own.
inline void check_out(const Tensor& out, std::initializer_list<std::pair<const char*, const Tensor*>> read) {
  if (!is_distinct(out)) fail("out", "memory of its own for each element", "elements that share some");
  Memory memory;
  memory.writes("out", out);
  for (const auto& [name, t] : read) {
    if (t != nullptr) memory.reads(name, *t);
  }
  memory.check();
}

inline const Tensor* pointer(const MaybeTensor& t) { return t ? &*t : nullptr; }

const float* bias_of(const MaybeTensor& bias, int64_t channels) {
  if (!bias) return nullptr;
  check_tensor(*bias, "bias", ScalarType::Float, channels);
  return static_cast<const float*>(bias->const_data_ptr());
}

void sparse_conv_cpu(const Tensor& input, const Tensor& starts, const Tensor& columns, const Tensor& values, const MaybeTensor& bias,
                     const MaybeTensor& residual, const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                     int64_t groups, int64_t halo, bool relu, const Tensor& out) {
  const ConvShape shape = conv_shape(input, "input", out, "out", halo, {kernel, stride, padding, dilation, groups});
  const Entries entries = entries_of(starts, columns, &values, shape.out_channels, shape.in_channels / groups, shape.taps(), 1);
  const float* const b = bias_of(bias, shape.out_channels);
  check_out(out, {{"input", &input},
                  {"starts", &starts},
                  {"columns", &columns},
                  {"values", &values},
                  {"bias", pointer(bias)},
                  {"residual", pointer(residual)}});
  by_layout(
      input, "input", out, residual, {}, shape, halo,
      [&](auto element) {
        using T = decltype(element);
        const Images<const T> other = residual ? images_of<const T>(*residual) : Images<const T>{};
        sparse_conv<T>(torch_machine(), shape, entries, images_of<const T>(input), {b, other, relu, {}}, images_of<T>(out));
      },
      [&] {
        check_reach(forward_axis(shape, 0), forward_axis(shape, 1), halo);
        const Blocks<const float> other = residual ? blocks_of<const float>(*residual, halo) : Blocks<const float>{};
        sparse_conv(torch_machine(), shape, entries, blocks_of<const float>(input, halo), {b, other, relu, {}},
                    blocks_of<float>(out, halo));
      });
}

void sparse_conv_input_grad_cpu(const Tensor& grad, const Tensor& starts, const Tensor& columns, const Tensor& values,
                                const MaybeTensor& residual, const MaybeTensor& gate, const Ints& kernel, const Ints& stride,
                                const Ints& padding, const Ints& dilation, int64_t groups, int64_t halo, const Tensor& out) {
  const ConvShape shape = conv_shape(out, "out", grad, "grad", halo, {kernel, stride, padding, dilation, groups});
  const Entries entries =
      entries_of(starts, columns, &values, shape.in_channels, shape.out_channels / groups, shape.taps(), shape.passes());
  check_passes(shape, entries);
  check_out(out, {{"grad", &grad},
                  {"starts", &starts},
                  {"columns", &columns},
                  {"values", &values},
                  {"residual", pointer(residual)},
                  {"gate", pointer(gate)}});
  by_layout(
      grad, "grad", out, residual, gate, shape, halo,
      [&](auto element) {
        using T = decltype(element);
        Epilogue<Images<const T>> epilogue;
        if (residual) epilogue.residual = images_of<const T>(*residual);
        if (gate) epilogue.gate = images_of<const T>(*gate);
        sparse_conv_input_grad<T>(torch_machine(), shape, entries, images_of<const T>(grad), epilogue, images_of<T>(out));
      },
      [&] {
        for_each_residue(shape, [&](int64_t, const Axis& y, const Axis& x) { check_reach(y, x, halo); });
        Epilogue<Blocks<const float>> epilogue;
        if (residual) epilogue.residual = blocks_of<const float>(*residual, halo);
        if (gate) epilogue.gate = blocks_of<const float>(*gate, halo);
        sparse_conv_input_grad(torch_machine(), shape, entries, blocks_of<const float>(grad, halo), epilogue, blocks_of<float>(out, halo));
      });
}

void sparse_conv_weight_grad_cpu(const Tensor& input, const Tensor& grad, const Tensor& starts, const Tensor& columns, const Ints& kernel,
                                 const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups, const Tensor& out) {
  if (input.dim() != 4) fail("input", "4 dimensions", std::to_string(input.dim()));
  const ConvShape shape = conv_shape(input, "input", grad, "grad", 0, {kernel, stride, padding, dilation, groups});
  const Entries entries = entries_of(starts, columns, nullptr, shape.out_channels, shape.in_channels / groups, shape.taps(), 1);
  if (exceeds({shape.out_channels, shape.in_channels / groups, shape.taps()}, kMostSize)) {
    fail("out", "fewer than 2**31 elements", std::to_string(out.numel()));
  }
  check_tensor(out, "out", ScalarType::Float, shape.out_channels * (shape.in_channels / groups) * shape.taps());
  check_out(out, {{"input", &input}, {"grad", &grad}, {"starts", &starts}, {"columns", &columns}});
  auto* const to = static_cast<float*>(out.mutable_data_ptr());
  if (input.numel() == 0 || grad.numel() == 0) {
    std::fill_n(to, out.numel(), 0.0f);
    return;
  }
  by_layout(
      input, "input", grad, {}, {}, shape, 0,
      [&](auto element) {
        using T = decltype(element);
        sparse_conv_weight_grad<T>(torch_machine(), shape, entries, images_of<const T>(input), images_of<const T>(grad), to);
      },
      [] {});
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) {
  m.impl("sparse_conv", TORCH_BOX(&s2ap::sparse_conv_cpu));
  m.impl("sparse_conv_input_grad", TORCH_BOX(&s2ap::sparse_conv_input_grad_cpu));
  m.impl("sparse_conv_weight_grad", TORCH_BOX(&s2ap::sparse_conv_weight_grad_cpu));
}

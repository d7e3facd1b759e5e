// Between torch's tensors and the kernels' pointers: checks with messages, dispatch on the dtype, torch's thread pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"
#include "element.h"

namespace s2ap {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using torch::headeronly::ScalarType;

inline Machine torch_machine() {
  return {best_isa(), static_cast<int>(torch::stable::get_num_threads()), [](int threads, void (*work)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(context); });
          }};
}

inline std::string at(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

[[noreturn]] inline void fail(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::runtime_error(what + ": expected " + expected + ", got " + got);
}

inline void check_tensor(const Tensor& t, const std::string& name, ScalarType dtype, int64_t numel) {
  if (!t.is_cpu()) fail(name, "a CPU tensor", "one on another device");
  if (t.scalar_type() != dtype) fail(name, toString(dtype), toString(t.scalar_type()));
  if (t.numel() != numel) fail(name, std::to_string(numel) + " elements", std::to_string(t.numel()));
  if (!t.is_contiguous()) fail(name, "a contiguous tensor", "a strided one");
}

// `list` has a tensor for each of `like`, of the same size and of the dtype of the first.
inline void check_list(const TensorList& list, const char* name, const TensorList& like) {
  if (list.size() != like.size()) fail(name, std::to_string(like.size()) + " tensors", std::to_string(list.size()));
  for (size_t i = 0; i < list.size(); ++i) check_tensor(list[i], at(name, i), like[0].scalar_type(), like[i].numel());
}

inline void check_table(const Tensor& t, const char* name, ScalarType dtype, size_t layers, int64_t columns) {
  check_tensor(t, name, dtype, static_cast<int64_t>(layers) * columns);
}

// The counts of `kept`, checked.
inline const int64_t* counts(const Tensor& kept, const TensorList& scores) {
  check_table(kept, "kept", ScalarType::Long, scores.size(), 1);
  const auto* count = static_cast<const int64_t*>(kept.const_data_ptr());
  for (size_t i = 0; i < scores.size(); ++i) {
    if (count[i] < 0 || count[i] > scores[i].numel()) {
      fail(at("kept", i), "a count in [0, " + std::to_string(scores[i].numel()) + "]", std::to_string(count[i]));
    }
  }
  return count;
}

template <class T>
const BitsOf<T>* input(const Tensor& t) {
  return static_cast<const BitsOf<T>*>(t.const_data_ptr());
}

template <class T>
BitsOf<T>* output(const Tensor& t) {
  return static_cast<BitsOf<T>*>(t.mutable_data_ptr());
}

// Calls f with the element type of `scores`.
template <class F>
void dispatch(const TensorList& scores, const F& f) {
  if (scores.empty()) return;
  switch (scores[0].scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: fail("scores[0]", "float32, float64, float16 or bfloat16", toString(scores[0].scalar_type()));
  }
}

}  // namespace s2ap

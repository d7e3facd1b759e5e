// Between torch's tensors and the kernels' pointers: checks with messages, dispatch on the dtype, torch's thread pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../memory.h"
#include "../plan.h"
#include "element.h"
#include "machine.h"

namespace s2ap {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using torch::headeronly::ScalarType;

inline Machine torch_machine() {
  return {best_isa(), static_cast<int>(torch::stable::get_num_threads()),
          [](int threads, void (*work)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(context); });
          },
          last_cache()};
}

// Whether torch rounds a + alpha * b once. That depends on the machine and on ATEN_CPU_CAPABILITY, so it is asked.
inline bool torch_fuses() {
  static const bool fuses = [] {
    const int64_t size[] = {1};
    const double x = 1 + 0x1p-12;  // x * x = 1 + 2^-11 + 2^-24, whose last bit float32 loses
    const auto filled = [&](double value) { return torch::stable::full({size, 1}, value, ScalarType::Float); };
    const Tensor difference = torch::stable::subtract(filled(1 + 0x1p-11), filled(x), x);
    return *static_cast<const float*>(difference.const_data_ptr()) != 0;
  }();
  return fuses;
}

[[noreturn]] inline void fail(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::runtime_error(what + ": expected " + expected + ", got " + got);
}

// What the kernels read or write of a tensor is there.
inline void check_memory(const Tensor& t, Argument name) {
  if (!t.is_cpu()) fail(name, "a CPU tensor", "one on another device");
  if (!is_whole(t)) fail(name, "memory for all its elements", "a storage that was made smaller");
}

inline void check_tensor(const Tensor& t, Argument name, ScalarType dtype, int64_t numel) {
  check_memory(t, name);
  if (t.scalar_type() != dtype) fail(name, toString(dtype), toString(t.scalar_type()));
  if (t.numel() != numel) fail(name, std::to_string(numel) + " elements", std::to_string(t.numel()));
  if (!t.is_contiguous()) fail(name, "a contiguous tensor", "a strided one");
}

// `list` has a tensor for each of `like`, of the same size and of the dtype of the first.
inline void check_list(const TensorList& list, const char* name, const TensorList& like) {
  if (list.size() != like.size()) fail(name, std::to_string(like.size()) + " tensors", std::to_string(list.size()));
  for (size_t i = 0; i < list.size(); ++i) check_tensor(list[i], {name, static_cast<int64_t>(i)}, like[0].scalar_type(), like[i].numel());
}

inline void check_table(const Tensor& t, const char* name, ScalarType dtype, size_t layers, int64_t columns) {
  check_tensor(t, name, dtype, static_cast<int64_t>(layers) * columns);
}

// The pattern of each layer; `numbers` is empty where all are plain.
inline std::vector<Pattern> patterns_of(const std::vector<int64_t>& numbers, const TensorList& scores) {
  std::vector<Pattern> patterns(scores.size());
  if (numbers.empty()) return patterns;
  if (numbers.size() != scores.size() * kPatternNumbers) {
    fail("patterns", std::to_string(scores.size() * kPatternNumbers) + " numbers", std::to_string(numbers.size()));
  }
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t* p = numbers.data() + i * kPatternNumbers;
    if (p[0] == kWeight) continue;  // which has no size
    patterns[i] = {p[0], p[1], p[2]};
    const int64_t n = scores[i].numel();
    const bool divides = p[1] >= 1 && p[2] >= 1 && n > 0 && n % p[1] == 0 && n / p[1] % p[2] == 0;
    if ((p[0] != kGroup && p[0] != kWindow) || !divides || (p[0] == kWindow && p[1] > kLargestWindow)) {
      fail(Argument("patterns", static_cast<int64_t>(i)), "a known kind and size * block that divides " + std::to_string(n) + " elements",
           "kind " + std::to_string(p[0]) + ", " + std::to_string(p[1]) + " * " + std::to_string(p[2]));
    }
  }
  return patterns;
}

// The counts of `kept`, checked.
inline const int64_t* counts(const Tensor& kept, const TensorList& scores, const std::vector<Pattern>& patterns) {
  check_table(kept, "kept", ScalarType::Long, scores.size(), 1);
  const auto* count = static_cast<const int64_t*>(kept.const_data_ptr());
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t most = patterns[i].kind == kWeight ? scores[i].numel() : patterns[i].size;
    if (count[i] < 0 || count[i] > most) {
      fail(Argument("kept", static_cast<int64_t>(i)), "a count in [0, " + std::to_string(most) + "]", std::to_string(count[i]));
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

// Calls f with the element type of a tensor.
template <class F>
void dispatch(const Tensor& t, Argument name, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      fail(name, "float32, float64, float16 or bfloat16", toString(t.scalar_type()));
  }
}

// The same with that of the scores, if there are any.
template <class F>
void dispatch(const TensorList& scores, const F& f) {
  if (!scores.empty()) dispatch(scores[0], {"scores", 0}, f);
}
inline void check_scores(const TensorList& scores) {
  dispatch(scores, [](auto) {});
  check_list(scores, "scores", scores);
}

}  // namespace s2ap

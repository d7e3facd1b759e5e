// Which memory an op reads and writes. The kernels rely on it that each tensor has the memory that its sizes tell, and that what they write
// is written once and read by nobody else: scores that change while they are ranked, or starts of rows that are written over, would take a
// kernel out of bounds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace s2ap {

// An argument of an op, or the index-th tensor of a list, by the name that messages give it.
struct Argument {
  Argument(const char* name, int64_t index = -1) : name(name), index(index) {}
  operator std::string() const { return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]"; }

  const char* name;
  int64_t index;
};

// How many elements there are from the first one of a tensor in memory to the last.
inline int64_t extent(const torch::stable::Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
  return last + 1;
}

// Whether the storage of a tensor holds all its elements. One that was resized may not.
inline bool is_whole(const torch::stable::Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return t.numel() == 0 || (t.storage_offset() + extent(t)) * static_cast<int64_t>(t.element_size()) <= bytes;
}

// Whether no two elements of a tensor share memory. Sorted by their strides, each axis must step over all that the ones before it reach.
inline bool is_distinct(const torch::stable::Tensor& t) {
  if (t.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    if (t.size(axis) > 1) axes.emplace_back(t.stride(axis), t.size(axis));
  }
  std::sort(axes.begin(), axes.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : axes) {
    if (stride <= reached) return false;
    reached += (size - 1) * stride;
  }
  return true;
}

// The arguments of one call.
class Memory {
 public:
  using Tensor = torch::stable::Tensor;

  void reads(Argument argument, const Tensor& t) { add(argument, t, false); }
  void writes(Argument argument, const Tensor& t) { add(argument, t, true); }
  void reads(const char* name, const std::vector<Tensor>& list) { add_all(name, list, false); }
  void writes(const char* name, const std::vector<Tensor>& list) { add_all(name, list, true); }

  // Throws if an argument that is written shares memory with any other. `op` comes first in the message.
  void check(const std::string& op = "") {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const Range *any = nullptr, *written = nullptr;  // of those before, the ones that reach furthest
    for (const Range& range : ranges_) {
      const Range* const before = range.written ? any : written;
      if (before != nullptr && range.begin < before->end) {
        const auto& [own, other] = range.written ? std::pair(range, *before) : std::pair(*before, range);
        throw std::runtime_error(op + std::string(own.argument) + ": expected memory of its own, got that of " +
                                 std::string(other.argument));
      }
      if (any == nullptr || range.end > any->end) any = &range;
      if (range.written && (written == nullptr || range.end > written->end)) written = &range;
    }
  }

 private:
  struct Range {
    uintptr_t begin, end;
    bool written;
    Argument argument;
  };

  void add(Argument argument, const Tensor& t, bool written) {
    if (t.numel() == 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    ranges_.push_back({begin, begin + static_cast<uintptr_t>(extent(t)) * t.element_size(), written, argument});
  }
  void add_all(const char* name, const std::vector<Tensor>& list, bool written) {
    for (size_t i = 0; i < list.size(); ++i) add({name, static_cast<int64_t>(i)}, list[i], written);
  }

  std::vector<Range> ranges_;
};

}  // namespace s2ap

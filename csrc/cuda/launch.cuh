// What the three host functions share: checking operands, allocating the workspace, launching. Host code only.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "../memory.h"
#include "number.cuh"
#include "table.cuh"

namespace s2ap::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlocksPerMultiprocessor = 2;  // bounds the registers of a thread to 64

inline void check_cuda(cudaError_t error, const char* op, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", what, " failed: ", cudaGetErrorString(error));
}

// ---- Operands

// One list of a call: as many tensors as `like`, contiguous, each with the size of its counterpart there, on the device and of the dtype
// of the first.
inline void check_list(const char* op, const char* name, const std::vector<Tensor>& list, const std::vector<Tensor>& like) {
  STD_TORCH_CHECK(list.size() == like.size(), op, ": ", name, ": expected ", like.size(), " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &tensor = list[i], &first = like[0];
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, ": ", name, "[", i,
                    "]: expected a tensor on CUDA device ", first.get_device_index());
    STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": ", name, "[", i, "]: expected the dtype of the first tensor");
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, "[", i, "]: expected a contiguous tensor");
    STD_TORCH_CHECK(is_whole(tensor), op, ": ", name, "[", i, "]: expected memory for all its elements");
    STD_TORCH_CHECK(tensor.numel() == like[i].numel(), op, ": ", name, "[", i, "]: expected ", like[i].numel(), " elements, got ",
                    tensor.numel());
    STD_TORCH_CHECK(tensor.numel() <= UINT32_MAX, op, ": ", name, "[", i, "]: expected at most 2**32 - 1 elements, got ", tensor.numel());
  }
}

// An array with one entry (or row) per layer.
inline void check_array(const char* op, const char* name, const Tensor& array, const Tensor& like, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(array.is_cuda() && array.get_device_index() == like.get_device_index(), op, ": ", name,
                  ": expected a tensor on CUDA device ", like.get_device_index());
  STD_TORCH_CHECK(array.scalar_type() == dtype, op, ": ", name, ": expected ", dtype == ScalarType::Long ? "int64" : "float64");
  STD_TORCH_CHECK(array.is_contiguous() && array.numel() == count, op, ": ", name, ": expected ", count, " contiguous elements, got ",
                  array.numel());
}

// The pattern of each layer; `numbers` is empty where all are plain.
inline std::vector<Pattern> patterns_of(const char* op, const std::vector<int64_t>& numbers, const std::vector<Tensor>& scores) {
  std::vector<Pattern> patterns(scores.size());
  if (numbers.empty()) return patterns;
  STD_TORCH_CHECK(numbers.size() == scores.size() * kPatternNumbers, op, ": patterns: expected ", scores.size() * kPatternNumbers,
                  " numbers, got ", numbers.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t *p = numbers.data() + i * kPatternNumbers, n = scores[i].numel();
    patterns[i] = {p[0], p[1], p[2]};
    bool divides = p[1] >= 1 && p[2] >= 1 && n > 0 && n % p[1] == 0 && n / p[1] % p[2] == 0;
    bool known = p[0] == kWeight || (p[0] == kGroup && divides) || (p[0] == kWindow && divides && p[1] <= kLargestWindow);
    STD_TORCH_CHECK(known, op, ": patterns[", i, "]: expected a known kind and size * block that divides ", n, " elements, got kind ", p[0],
                    ", ", p[1], " * ", p[2]);
  }
  return patterns;
}

// Calls run(T{}) with the C++ type of the tensor's elements.
template <class Run>
void dispatch(const char* op, const Tensor& tensor, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Half:
      return run(Float16{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, float16 or bfloat16 tensors");
  }
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// ---- Workspace

// Memory for all arrays of `args` (for_each_array), from torch's allocator. It may be let go as soon as the launch is
// enqueued: the allocator gives it only to later work of the same stream.
template <class Args>
Tensor allocate_workspace(Args& args, const Tensor& like) {
  constexpr int64_t alignment = 16;
  int64_t bytes = 0;
  for_each_array(args, [&](auto*& pointer, int64_t count) { bytes += (count * sizeof(*pointer) + alignment - 1) / alignment * alignment; });
  Tensor memory = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  char* next = data<char>(memory);
  for_each_array(args, [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(next);
    next += (count * sizeof(*pointer) + alignment - 1) / alignment * alignment;
  });
  return memory;
}

// ---- Launches

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether the environment asks for a launch for each phase, so that a profiler sees how long each takes (benchmarks/gpu/phases.py).
inline bool phases_are_apart() {
  static const bool apart = std::getenv("S2AP_PHASES_APART") != nullptr;
  return apart;
}

// kernel(args, first, last) runs phases first to last - 1 with grid barriers between them. All phases go in one cooperative launch of
// as many blocks as the GPU holds at once, or, where that is refused (no support, a share of a GPU under MPS), in one launch each.
template <class Args>
void launch_phases(const char* op, void (*kernel)(Args, int, int), const Args& args, int64_t chunks, int phases, int device) {
  cudaStream_t stream = current_stream(device);
  int multiprocessors = 0, cooperative = 0, resident = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), op, "reading a device attribute");
  check_cuda(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), op, "reading a device attribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), op, "reading the kernel's occupancy");
  STD_TORCH_CHECK(resident > 0, op, ": the kernel does not fit this GPU");
  unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(chunks, 1, static_cast<int64_t>(resident) * multiprocessors));

  if (cooperative && !phases_are_apart()) {
    int first = 0;
    void* parameters[] = {const_cast<Args*>(&args), &first, &phases};
    cudaError_t error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), blocks, kThreads, parameters, 0, stream);
    if (error == cudaSuccess) return;
    STD_TORCH_CHECK(error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported, op,
                    ": launch failed: ", cudaGetErrorString(error));
    cudaGetLastError();  // this refusal is dealt with; the next check is not to find it
  }
  for (int phase = 0; phase < phases; ++phase) {
    kernel<<<blocks, kThreads, 0, stream>>>(args, phase, phase + 1);
    check_cuda(cudaGetLastError(), op, "launch");
  }
}

}  // namespace s2ap::cuda

// update: one SGD step on the scores of all layers, in place.
//
// The arithmetic is that of torch.optim.SGD on CUDA, bit for bit (step.cuh).
//
// Bytes per element, float32: scores and momentum read and written, gradients read: 20, which is the floor. Elements do not depend on
// one another, so this is an ordinary launch, one block per chunk of any layer.
#include "step.cuh"
#include "table.cuh"

namespace s2ap::cuda {

template <class T>
struct UpdateLayer {
  T* scores;
  const T* grads;
  T* momentum;  // null where there is none
  int64_t n;
};

template <class T>
struct UpdateArgs {
  Table<UpdateLayer<T>> table;
  Sgd<T> sgd;
};

template <class Grid, class T>
S2AP_DEVICE void update_chunks(const Grid& grid, const UpdateArgs<T>& args) {
  struct Element {
    T score, grad, momentum;
  };
  for_each_segment(grid, args.table, [&](Segment segment) {
    const UpdateLayer<T>& row = args.table.rows[segment.layer];
    for (int64_t chunk = segment.begin; chunk < segment.end; ++chunk) {
      int64_t first = chunk * kChunk;
      for_each_element(
          grid, chunk_length(row.n, chunk),
          [&](int j) {
            int64_t i = first + j;
            return Element{row.scores[i], row.grads[i], row.momentum ? row.momentum[i] : T{}};
          },
          [&](int j, bool valid, const Element& element) {
            if (!valid) return;
            int64_t i = first + j;
            T buffer = element.momentum;
            row.scores[i] = args.sgd.step(element.score, element.grad, row.momentum != nullptr, buffer);
            if (row.momentum) row.momentum[i] = buffer;
          });
    }
  });
}

}  // namespace s2ap::cuda

#if defined(__CUDACC__)

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace s2ap::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ UpdateArgs<T> args) {
  update_chunks(CudaGrid{}, args);
}

void update_cuda(std::vector<Tensor> scores, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers, double lr, double momentum,
                 double dampening, double weight_decay, bool nesterov) {
  if (scores.empty()) return;
  int64_t layers = static_cast<int64_t>(scores.size());
  bool has_momentum = !momentum_buffers.empty();
  check_list("update", "scores", scores, scores);
  check_list("update", "grads", grads, scores);
  if (has_momentum) check_list("update", "momentum_buffers", momentum_buffers, scores);
  Memory memory;
  memory.reads("grads", grads);
  memory.writes("scores", scores);
  memory.writes("momentum_buffers", momentum_buffers);
  memory.check("update: ");
  int device = scores[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);

  dispatch("update", scores[0], [&](auto zero) {
    using T = decltype(zero);
    for (int64_t begin = 0; begin < layers; begin += kMaxLayers) {
      UpdateArgs<T> args;
      for (int64_t i = begin; i < std::min(begin + kMaxLayers, layers); ++i) {
        args.table.push({data<T>(scores[i]), data<T>(grads[i]), has_momentum ? data<T>(momentum_buffers[i]) : nullptr, scores[i].numel()});
      }
      args.sgd = Sgd<T>::of(lr, momentum, dampening, weight_decay, nesterov);
      int64_t chunks = args.table.chunks();
      if (chunks == 0) continue;
      update_kernel<T><<<static_cast<unsigned>(chunks), kThreads, 0, current_stream(device)>>>(args);
      check_cuda(cudaGetLastError(), "update", "launch");
    }
  });
}

}  // namespace s2ap::cuda

STABLE_TORCH_LIBRARY_IMPL(s2ap, CUDA, m) { m.impl("update", TORCH_BOX(&s2ap::cuda::update_cuda)); }

#endif

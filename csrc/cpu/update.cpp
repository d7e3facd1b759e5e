// The op s2ap::update on the CPU. The kernel is in update.h.
#include "update.h"

#include "torch_binding.h"

namespace s2ap {

void update_cpu(const TensorList& scores, const TensorList& grads, const TensorList& momentum_buffers, double lr, double momentum,
                double dampening, double weight_decay, bool nesterov) {
  check_scores(scores);
  check_list(grads, "grads", scores);
  if (!momentum_buffers.empty()) check_list(momentum_buffers, "momentum_buffers", scores);
  Memory memory;
  memory.reads("grads", grads);
  memory.writes("scores", scores);
  memory.writes("momentum_buffers", momentum_buffers);
  memory.check();
  dispatch(scores, [&](auto element) {
    using T = decltype(element);
    std::vector<UpdateLayer<T>> layers;
    for (size_t i = 0; i < scores.size(); ++i) {
      BitsOf<T>* buffer = momentum_buffers.empty() ? nullptr : output<T>(momentum_buffers[i]);
      layers.push_back({output<T>(scores[i]), input<T>(grads[i]), buffer, scores[i].numel()});
    }
    update(torch_machine(), layers, {lr, momentum, dampening, weight_decay, nesterov}, torch_fuses());
  });
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) { m.impl("update", TORCH_BOX(&s2ap::update_cpu)); }

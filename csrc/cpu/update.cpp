// The op s2ap::update on the CPU. The kernel is in update.h.
#include "update.h"

#include "torch_binding.h"

namespace s2ap {

// Whether torch rounds a + alpha * b once. That depends on the machine and on ATEN_CPU_CAPABILITY, so it is asked.
bool torch_fuses() {
  static const bool fuses = [] {
    const int64_t size[] = {1};
    const double x = 1 + 0x1p-12;  // x * x = 1 + 2^-11 + 2^-24, whose last bit float32 loses
    const auto filled = [&](double value) { return torch::stable::full({size, 1}, value, ScalarType::Float); };
    const Tensor difference = torch::stable::subtract(filled(1 + 0x1p-11), filled(x), x);
    return *static_cast<const float*>(difference.const_data_ptr()) != 0;
  }();
  return fuses;
}

void update_cpu(const TensorList& scores, const TensorList& grads, const TensorList& momentum_buffers, double lr, double momentum,
                double dampening, double weight_decay, bool nesterov) {
  dispatch(scores, [&](auto element) {
    using T = decltype(element);
    check_list(scores, "scores", scores);
    check_list(grads, "grads", scores);
    if (!momentum_buffers.empty()) check_list(momentum_buffers, "momentum_buffers", scores);
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

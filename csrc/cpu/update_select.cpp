// The op s2ap::update_select on the CPU. The kernel is in update_select.h.
#include "update_select.h"

#include "torch_binding.h"

namespace s2ap {

void update_select_cpu(const TensorList& scores, const TensorList& grads, const TensorList& ascent_grads, const Tensor& scales,
                       const TensorList& momentum_buffers, const TensorList& weights, const Tensor& kept,
                       const std::vector<int64_t>& pattern_numbers, const Tensor& cuts, double lr, double momentum, double dampening,
                       double weight_decay, bool nesterov, bool straight_through, const TensorList& masked, const Tensor& new_cuts,
                       const Tensor& squares) {
  check_scores(scores);
  check_list(grads, "grads", scores);
  if (!ascent_grads.empty()) check_list(ascent_grads, "ascent_grads", scores);
  if (!momentum_buffers.empty()) check_list(momentum_buffers, "momentum_buffers", scores);
  check_list(weights, "weights", scores);
  check_list(masked, "masked", scores);
  check_table(scales, "scales", ScalarType::Double, scores.size(), 1);
  check_table(cuts, "cuts", ScalarType::Long, scores.size(), kCutColumns);
  check_table(new_cuts, "new_cuts", ScalarType::Long, scores.size(), kCutColumns);
  check_table(squares, "squares", ScalarType::Double, scores.size(), 1);
  const std::vector<Pattern> patterns = patterns_of(pattern_numbers, scores);
  const int64_t* count = counts(kept, scores, patterns);
  Memory memory;
  memory.reads("grads", grads);
  memory.reads("ascent_grads", ascent_grads);
  memory.reads("scales", scales);
  memory.reads("weights", weights);
  memory.reads("kept", kept);
  if (cuts.const_data_ptr() != new_cuts.const_data_ptr()) memory.reads("cuts", cuts);  // they may be one: present masks are noted first
  memory.writes("scores", scores);
  memory.writes("momentum_buffers", momentum_buffers);
  memory.writes("masked", masked);
  memory.writes("new_cuts", new_cuts);
  memory.writes("squares", squares);
  memory.check();
  dispatch(scores, [&](auto element) {
    using T = decltype(element);
    std::vector<UpdateSelectLayer<T>> layers;
    for (size_t i = 0; i < scores.size(); ++i) {
      BitsOf<T>* buffer = momentum_buffers.empty() ? nullptr : output<T>(momentum_buffers[i]);
      const BitsOf<T>* ascent_grad = ascent_grads.empty() ? nullptr : input<T>(ascent_grads[i]);
      layers.push_back({{output<T>(scores[i]), input<T>(grads[i]), buffer, scores[i].numel()},
                        ascent_grad,
                        input<T>(weights[i]),
                        output<T>(masked[i]),
                        count[i],
                        patterns[i]});
    }
    const UpdateSelect how = {{lr, momentum, dampening, weight_decay, nesterov},
                              torch_fuses(),
                              straight_through,
                              static_cast<const double*>(scales.const_data_ptr())};
    update_select(torch_machine(), layers, how, static_cast<const int64_t*>(cuts.const_data_ptr()),
                  static_cast<int64_t*>(new_cuts.mutable_data_ptr()), static_cast<double*>(squares.mutable_data_ptr()));
  });
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) { m.impl("update_select", TORCH_BOX(&s2ap::update_select_cpu)); }

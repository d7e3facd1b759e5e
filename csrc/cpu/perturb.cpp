// The op s2ap::perturb on the CPU. The kernel is in perturb.h.
#include "perturb.h"

#include "torch_binding.h"

namespace s2ap {

void perturb_cpu(const TensorList& scores, const TensorList& grads, const TensorList& weights, const Tensor& kept, const Tensor& cuts,
                 double gamma, double eps, const TensorList& masked, const Tensor& new_cuts, const Tensor& scales) {
  dispatch(scores, [&](auto element) {
    using T = decltype(element);
    check_list(scores, "scores", scores);
    check_list(grads, "grads", scores);
    check_list(weights, "weights", scores);
    check_list(masked, "masked", scores);
    check_table(cuts, "cuts", ScalarType::Long, scores.size(), kCutColumns);
    check_table(new_cuts, "new_cuts", ScalarType::Long, scores.size(), kCutColumns);
    check_table(scales, "scales", ScalarType::Double, scores.size(), 1);
    const int64_t* count = counts(kept, scores);
    std::vector<PerturbLayer<T>> layers;
    for (size_t i = 0; i < scores.size(); ++i) {
      layers.push_back({input<T>(scores[i]), input<T>(grads[i]), input<T>(weights[i]), output<T>(masked[i]), scores[i].numel(), count[i]});
    }
    perturb(torch_machine(), layers, static_cast<const int64_t*>(cuts.const_data_ptr()), gamma, eps,
            static_cast<int64_t*>(new_cuts.mutable_data_ptr()), static_cast<double*>(scales.mutable_data_ptr()));
  });
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) { m.impl("perturb", TORCH_BOX(&s2ap::perturb_cpu)); }

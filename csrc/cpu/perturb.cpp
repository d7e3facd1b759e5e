// The op s2ap::perturb on the CPU. The kernel is in perturb.h.
#include "perturb.h"

#include <optional>

#include "torch_binding.h"

namespace s2ap {

void perturb_cpu(const TensorList& scores, const TensorList& grads, const TensorList& weights, const Tensor& kept,
                 const std::vector<int64_t>& pattern_numbers, const Tensor& cuts, const std::optional<Tensor>& squares, const Tensor& gamma,
                 double eps, bool straight_through, const TensorList& masked, const Tensor& new_cuts, const Tensor& scales) {
  check_scores(scores);
  check_list(grads, "grads", scores);
  check_list(weights, "weights", scores);
  check_list(masked, "masked", scores);
  check_table(cuts, "cuts", ScalarType::Long, scores.size(), kCutColumns);
  check_table(new_cuts, "new_cuts", ScalarType::Long, scores.size(), kCutColumns);
  if (squares) check_table(*squares, "squares", ScalarType::Double, scores.size(), 1);
  check_table(gamma, "gamma", ScalarType::Double, scores.size(), 1);
  check_table(scales, "scales", ScalarType::Double, scores.size(), 1);
  const std::vector<Pattern> patterns = patterns_of(pattern_numbers, scores);
  const int64_t* count = counts(kept, scores, patterns);
  Memory memory;
  memory.reads("scores", scores);
  memory.reads("grads", grads);
  memory.reads("weights", weights);
  memory.reads("kept", kept);
  if (cuts.const_data_ptr() != new_cuts.const_data_ptr()) memory.reads("cuts", cuts);  // they may be one: present masks are noted first
  if (squares) memory.reads("squares", *squares);
  memory.reads("gamma", gamma);
  memory.writes("masked", masked);
  memory.writes("new_cuts", new_cuts);
  memory.writes("scales", scales);
  memory.check();
  dispatch(scores, [&](auto element) {
    using T = decltype(element);
    std::vector<PerturbLayer<T>> layers;
    for (size_t i = 0; i < scores.size(); ++i) {
      layers.push_back(
          {input<T>(scores[i]), input<T>(grads[i]), input<T>(weights[i]), output<T>(masked[i]), scores[i].numel(), count[i], patterns[i]});
    }
    const auto* square = squares ? static_cast<const double*>(squares->const_data_ptr()) : nullptr;
    const Ascent ascent = {static_cast<const double*>(gamma.const_data_ptr()), eps, straight_through, square};
    perturb(torch_machine(), layers, ascent, static_cast<const int64_t*>(cuts.const_data_ptr()),
            static_cast<int64_t*>(new_cuts.mutable_data_ptr()), static_cast<double*>(scales.mutable_data_ptr()));
  });
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) { m.impl("perturb", TORCH_BOX(&s2ap::perturb_cpu)); }

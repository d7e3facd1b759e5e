// The op s2ap::select on the CPU. The kernel is in select.h.
#include "select.h"

#include "torch_binding.h"

namespace s2ap {

void select_cpu(const TensorList& scores, const TensorList& weights, const Tensor& kept, const std::vector<int64_t>& pattern_numbers,
                const TensorList& masked, const Tensor& cuts) {
  check_scores(scores);
  check_list(weights, "weights", scores);
  check_list(masked, "masked", scores);
  check_table(cuts, "cuts", ScalarType::Long, scores.size(), kCutColumns);
  const std::vector<Pattern> patterns = patterns_of(pattern_numbers, scores);
  const int64_t* count = counts(kept, scores, patterns);
  Memory memory;
  memory.reads("scores", scores);
  memory.reads("weights", weights);
  memory.reads("kept", kept);
  memory.writes("masked", masked);
  memory.writes("cuts", cuts);
  memory.check();
  dispatch(scores, [&](auto element) {
    using T = decltype(element);
    std::vector<SelectLayer<T>> layers;
    for (size_t i = 0; i < scores.size(); ++i) {
      layers.push_back({input<T>(scores[i]), input<T>(weights[i]), output<T>(masked[i]), scores[i].numel(), count[i], patterns[i]});
    }
    select(torch_machine(), layers, static_cast<int64_t*>(cuts.mutable_data_ptr()));
  });
}

}  // namespace s2ap

STABLE_TORCH_LIBRARY_IMPL(s2ap, CPU, m) { m.impl("select", TORCH_BOX(&s2ap::select_cpu)); }

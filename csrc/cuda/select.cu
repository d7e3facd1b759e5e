// select: the masked weights of all layers at once, out[l] = weights[l] where |scores[l]| is among the kept[l] largest, else +0; or what
// the layer's pattern says.
//
// The algorithm is that of selection.cuh: exact for every input. Bytes per element, float32: the scores, the weights and the masked weights
// once each, which is the floor of 12; 1/4 for a bit each; and, where a tenth is kept, 0.8 for the lists. Where the sample misleads, the
// scores are read 5 times: 28; in layers of at most 4096 elements, 3 times: 20; where all are equal, twice, and again where ties must go.
// Patterns (pattern.cuh) take 12 for windows, 16 for groups.
//
// One cooperative launch for all layers, usually with 4 grid barriers in it. A launch per layer and phase would be 100 launches for a
// ResNet-18, most of them too small to fill a GPU. Nothing is copied to the host, so nothing waits; `kept` is read on the device.
#include "pattern.cuh"

namespace s2ap::cuda {

template <class T>
struct SelectArgs {
  Selection<T> selection;
  Groups groups;

  template <int kind = kWeight>
  S2AP_DEVICE ScoreReader<T> reader(int layer) const {
    return {selection.table.rows[layer].scores};
  }
  // Once the table is full.
  void plan() { groups.take(selection.table, 1); }
  int phases() const { return 1 + selection_and_pattern_phases<T>(groups); }
};

template <class T, class Array>
void for_each_array(SelectArgs<T>& args, Array&& array) {
  for_each_array(args.selection, array);
  for_each_array(args.groups, array);
}

template <class Grid, class T>
S2AP_DEVICE void select_phases(const Grid& grid, const SelectArgs<T>& args, int first, int last) {
  auto& storage = grid.template shared<SelectionStorage<T>>();
  run_phases(
      grid, first, last, [&](int phase) { return selection_and_pattern_phase_is_idle(args, phase - 1); },
      [&](int phase) {
        if (phase == 0) {
          prepare(grid, args.selection);
          guess(grid, args.selection, storage, [&](int layer) { return args.reader(layer); });
        } else {
          selection_and_pattern_phase(grid, args, storage, phase - 1);
        }
      });
}

}  // namespace s2ap::cuda

#if defined(__CUDACC__)

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace s2ap::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    select_kernel(const __grid_constant__ SelectArgs<T> args, int first, int last) {
  select_phases(CudaGrid{}, args, first, last);
}

void select_cuda(std::vector<Tensor> scores, std::vector<Tensor> weights, Tensor kept, std::vector<int64_t> pattern_numbers,
                 std::vector<Tensor> masked, Tensor cuts) {
  if (scores.empty()) return;
  int64_t layers = static_cast<int64_t>(scores.size());
  check_list("select", "scores", scores, scores);
  check_list("select", "weights", weights, scores);
  check_list("select", "masked", masked, scores);
  check_array("select", "kept", kept, scores[0], layers, ScalarType::Long);
  check_array("select", "cuts", cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  std::vector<Pattern> patterns = patterns_of("select", pattern_numbers, scores);
  Memory memory;
  memory.reads("scores", scores);
  memory.reads("weights", weights);
  memory.reads("kept", kept);
  memory.writes("masked", masked);
  memory.writes("cuts", cuts);
  memory.check("select: ");
  int device = scores[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);

  dispatch("select", scores[0], [&](auto zero) {
    using T = decltype(zero);
    for (int64_t begin = 0; begin < layers; begin += kMaxLayers) {
      SelectArgs<T> args;
      Selection<T>& s = args.selection;
      for (int64_t i = begin; i < std::min(begin + kMaxLayers, layers); ++i) {
        s.table.push({data<T>(scores[i]), nullptr, data<T>(weights[i]), data<T>(masked[i]), scores[i].numel(), patterns[i]});
      }
      s.kept = data<int64_t>(kept) + begin;
      s.cuts = data<int64_t>(cuts) + begin * kCutColumns;
      args.plan();
      Tensor workspace = allocate_workspace(args, scores[0]);
      launch_phases("select", select_kernel<T>, args, s.table.chunks(), args.phases(), device);
    }
  });
}

}  // namespace s2ap::cuda

STABLE_TORCH_LIBRARY_IMPL(s2ap, CUDA, m) { m.impl("select", TORCH_BOX(&s2ap::cuda::select_cuda)); }

#endif

// perturb: the masked weights of all layers at the perturbed scores s + z, z = gamma * ||s|| * g / (||g|| + eps) per layer, and how
// many mask entries and signs that changes.
//
// Given the layer's scale a = gamma * ||s|| / (||g|| + eps), s + z is a function of s and g alone. So it is worked out anew wherever it
// is read and never stored, and the scores need no restoring. Product and sum are rounded apart (no fused
// multiply-add), as in the reference.
//
// First the norms, one pass over s and g and a grid barrier for each level of their sums (sums.cuh); then the selection of radix.cuh
// with s + z for s. Bytes per element, float32: 8 for the norms, 8 for each of 3 digits, 16 to apply: 48. The floor is 28 (the norms must
// be known before the first s + z); scores and gradients come out of the L2 cache from the second time on where they fit.
//
// One cooperative launch for all layers, for the reasons given in select.cu.
#include "radix.cuh"
#include "sums.cuh"

namespace s2ap::cuda {

struct Cut {
  int64_t key, index;
};

template <class T>
struct PerturbedReader {
  struct Raw {
    T score, grad;
  };
  const T* scores;
  const T* grads;
  Compute<T> scale;
  Cut cut_now;

  S2AP_DEVICE Raw load(int64_t i) const { return {scores[i], grads[i]}; }
  S2AP_DEVICE Compute<T> score(Raw raw) const { return widen(Number<T>::round(add(widen(raw.score), multiply(widen(raw.grad), scale)))); }
  S2AP_DEVICE bool was_kept(Raw raw, int64_t i) const {
    int64_t key = static_cast<int64_t>(key_of(widen(raw.score)));
    return key > cut_now.key || (key == cut_now.key && i >= cut_now.index);
  }
  S2AP_DEVICE void tally(Raw raw, Compute<T> moved, int64_t i, bool keep, Tally& tally) const {
    Compute<T> now = widen(raw.score);
    tally.flips += keep != was_kept(raw, i);
    tally.signs += (moved > 0) != (now > 0) || (moved < 0) != (now < 0);
  }
  S2AP_DEVICE void drop(Raw raw, int64_t i, Tally& tally) const { tally.flips += was_kept(raw, i) ? 1 : -1; }
};

template <class T>
struct PerturbArgs {
  Selection<T> selection;
  const int64_t* cuts_now;  // [layers, kCutColumns]; may be selection.cuts
  double gamma, eps;
  double* scales;  // [layers]
  // Workspace, not initialised.
  Sums sums;
  Cut* saved_cuts;  // [layers]

  S2AP_DEVICE double scale(int layer) const {
    double norm_s = square_root(sum_of_squares(selection.table, sums, layer, 0));
    double norm_g = square_root(sum_of_squares(selection.table, sums, layer, 1));
    if (norm_g == 0) return 0;
    return static_cast<Compute<T>>(divide(multiply(gamma, norm_s), add(norm_g, eps)));
  }
  S2AP_DEVICE PerturbedReader<T> reader(int layer) const {
    const Layer<T>& row = selection.table.rows[layer];
    return {row.scores, row.grads, static_cast<Compute<T>>(scale(layer)), saved_cuts[layer]};
  }
  int phases() const { return sums.levels + kSelectionPhases<T>; }
};

template <class T, class Array>
void for_each_array(PerturbArgs<T>& args, Array&& array) {
  for_each_array(args.selection, array);
  for (double*& level : args.sums.level) array(level, 2 * args.selection.table.chunks());
  array(args.saved_cuts, static_cast<int64_t>(args.selection.table.layers));
}

// One thread per layer; before prepare(), which may overwrite cuts_now.
template <class Grid, class T>
S2AP_DEVICE void save_cuts(const Grid& grid, const PerturbArgs<T>& args) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  for (int64_t layer = thread; layer < args.selection.table.layers; layer += static_cast<int64_t>(grid.blocks()) * grid.threads()) {
    const int64_t* cut = args.cuts_now + layer * kCutColumns;
    args.saved_cuts[layer] = {cut[kKey], cut[kIndex]};
  }
}

template <class Grid, class T>
S2AP_DEVICE void write_scales(const Grid& grid, const PerturbArgs<T>& args) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  for (int64_t layer = thread; layer < args.selection.table.layers; layer += static_cast<int64_t>(grid.blocks()) * grid.threads()) {
    args.scales[layer] = args.scale(static_cast<int>(layer));
  }
}

template <class Grid, class T>
S2AP_DEVICE void perturb_phases(const Grid& grid, const PerturbArgs<T>& args, int first, int last) {
  auto& storage = grid.template shared<SelectionStorage<T>>();
  for (int phase = first; phase < last; ++phase) {
    if (phase > first) grid.grid_barrier();
    if (phase == 0) {
      save_cuts(grid, args);
      prepare(grid, args.selection);
      sum_squares(grid, args.selection.table, args.sums);
    } else if (phase < args.sums.levels) {
      sum_again(grid, args.selection.table, args.sums, phase);
    } else {
      if (phase == args.sums.levels) write_scales(grid, args);
      selection_phase(grid, args, storage, phase - args.sums.levels);
    }
  }
}

}  // namespace s2ap::cuda

#if defined(__CUDACC__)

#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace s2ap::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    perturb_kernel(const __grid_constant__ PerturbArgs<T> args, int first, int last) {
  perturb_phases(CudaGrid{}, args, first, last);
}

void perturb_cuda(std::vector<Tensor> scores, std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor kept, Tensor cuts,
                  double gamma, double eps, std::vector<Tensor> masked, Tensor new_cuts, Tensor scales) {
  if (scores.empty()) return;
  int64_t layers = static_cast<int64_t>(scores.size());
  check_list("perturb", "scores", scores, scores);
  check_list("perturb", "grads", grads, scores);
  check_list("perturb", "weights", weights, scores);
  check_list("perturb", "masked", masked, scores);
  check_array("perturb", "kept", kept, scores[0], layers, ScalarType::Long);
  check_array("perturb", "cuts", cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  check_array("perturb", "new_cuts", new_cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  check_array("perturb", "scales", scales, scores[0], layers, ScalarType::Double);
  int device = scores[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);

  dispatch("perturb", scores[0], [&](auto zero) {
    using T = decltype(zero);
    for (int64_t begin = 0; begin < layers; begin += kMaxLayers) {
      PerturbArgs<T> args;
      Selection<T>& s = args.selection;
      for (int64_t i = begin; i < std::min(begin + kMaxLayers, layers); ++i) {
        s.table.push({data<T>(scores[i]), data<T>(grads[i]), data<T>(weights[i]), data<T>(masked[i]), scores[i].numel()});
      }
      s.kept = data<int64_t>(kept) + begin;
      s.cuts = data<int64_t>(new_cuts) + begin * kCutColumns;
      args.cuts_now = data<int64_t>(cuts) + begin * kCutColumns;
      args.gamma = gamma;
      args.eps = eps;
      args.scales = data<double>(scales) + begin;
      args.sums.levels = sum_levels(s.table);
      Tensor workspace = allocate_workspace(args, scores[0]);
      launch_phases("perturb", perturb_kernel<T>, args, s.table.chunks(), args.phases(), device);
    }
  });
}

}  // namespace s2ap::cuda

STABLE_TORCH_LIBRARY_IMPL(s2ap, CUDA, m) { m.impl("perturb", TORCH_BOX(&s2ap::cuda::perturb_cuda)); }

#endif

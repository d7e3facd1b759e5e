// perturb: the masked weights of all layers at the perturbed scores s + z, z = gamma * ||s|| * g / (||g|| + eps) per layer, each with its
// own gamma, and how many mask entries and signs that changes.
//
// Given the layer's scale a = gamma * ||s|| / (||g|| + eps), or 0 where g or gamma is 0, s + z is a function of s and g alone. So it is
// worked out anew wherever it is read and never stored, and the scores need no restoring. Product and sum are rounded apart (no fused
// multiply-add), as in the reference.
//
// Where the gradients are those of the masked weights (straight_through), the scores' own, g * w * sign(s), are formed likewise wherever
// they are read.
//
// First the norms, one pass over s and g and a grid barrier for each level of their sums (sums.cuh); then the selection of selection.cuh
// with s + z for s, whose brackets lie around the cuts of s. Bytes per element, float32: 8 for the norms, which must be known before the
// first s + z; 8 for the sweep, 8 for the weights and the masked weights, which makes the floor of 24; 1/2 for two bits each, and, where a
// tenth is kept, 0.5 for the lists. With straight_through the norms and the sweep read w as well: 8 more. Where the sums of squares of the
// scores are given, the norms read 4 less, but for straight_through, which needs the scores' signs. Windows take 8 + 16, groups 8 + 8 + 16
// (pattern.cuh).
//
// One cooperative launch for all layers, for the reasons given in select.cu.
#include "pattern.cuh"
#include "step.cuh"

namespace s2ap::cuda {

// What the gradient of score i is made from: as given, or formed from that of the masked weight. Loads first, then arithmetic, so that many
// elements' loads are in flight at once.
template <class T>
struct GradientReader {
  struct Raw {
    T score, grad, weight;
  };
  const T *scores, *grads, *weights;
  bool straight_through;

  S2AP_DEVICE Raw load(int64_t i) const { return {scores[i], grads[i], straight_through ? weights[i] : T{}}; }
  S2AP_DEVICE T gradient(Raw raw) const { return straight_through ? score_grad(raw.grad, raw.weight, raw.score) : raw.grad; }
};

// Mask: which elements stay at the scores themselves.
template <class T, class Mask>
struct PerturbedReader {
  using Raw = typename GradientReader<T>::Raw;
  static constexpr bool kFlips = true, kNotes = true;
  GradientReader<T> from;
  Compute<T> scale;
  Mask now;

  S2AP_DEVICE Raw load(int64_t i) const { return from.load(i); }
  S2AP_DEVICE Compute<T> score(Raw raw) const { return widen(perturbed(raw.score, from.gradient(raw), scale)); }
  S2AP_DEVICE bool was_kept(Raw raw, int64_t i) const { return now.keeps(key_of(widen(raw.score)), i); }
  S2AP_DEVICE void tally(Raw raw, Compute<T> moved, Tally& tally) const {
    Compute<T> present = widen(raw.score);
    tally.signs += (moved > 0) != (present > 0) || (moved < 0) != (present < 0);
  }
};

template <class T>
struct PerturbArgs {
  Selection<T> selection;
  const int64_t* cuts_now;  // [layers, kCutColumns]; may be selection.cuts
  const double* squares;    // [layers], the sums of squares of the scores; null where they must be taken
  const double* gammas;     // [layers]
  double eps;
  bool straight_through;
  double* scales;  // [layers]
  // Workspace, not initialised.
  Sums sums;  // quantity 0 is the gradients', 1 the scores'
  Groups groups;
  Cut* saved_cuts;  // [layers]

  // Once the sums are complete. Every block works it out for itself, which costs less than a barrier.
  S2AP_DEVICE double scale(int layer) const {
    const Table<Layer<T>>& table = selection.table;
    double norm_g = square_root(sum_of_squares(table, sums, layer, 0));
    double norm_s = square_root(squares != nullptr ? squares[layer] : sum_of_squares(table, sums, layer, 1));
    double gamma = gammas[layer];  // 0 gives 0 even where a norm is infinite
    if (gamma == 0 || norm_g == 0) return 0;
    return static_cast<Compute<T>>(divide(multiply(gamma, norm_s), add(norm_g, eps)));
  }
  template <int kind>
  S2AP_DEVICE auto mask_now(int layer) const {
    const Layer<T>& row = selection.table.rows[layer];
    Cut cut = saved_cuts[layer];
    if constexpr (kind == kGroup) {
      return GroupMask(groups, selection.table, layer, 1, cut);
    } else if constexpr (kind == kWindow) {
      return WindowMask<ScoreReader<T>>{row.pattern, cut.index, {row.scores}};
    } else {
      return CutMask<KeyOf<T>>{cut};
    }
  }
  S2AP_DEVICE GradientReader<T> gradients(const Layer<T>& row) const { return {row.scores, row.grads, row.weights, straight_through}; }
  template <int kind = kWeight>
  S2AP_DEVICE auto reader(int layer) const {
    auto now = mask_now<kind>(layer);
    return PerturbedReader<T, decltype(now)>{gradients(selection.table.rows[layer]), static_cast<Compute<T>>(scale(layer)), now};
  }
  // Once the table is full and the options are set.
  void plan() {
    sums.quantities = squares != nullptr ? 1 : 2;
    sums.levels = sum_levels(selection.table);
    groups.take(selection.table, 2);
  }
  int phases() const { return sums.levels + selection_and_pattern_phases<T>(groups); }
};

template <class T, class Array>
void for_each_array(PerturbArgs<T>& args, Array&& array) {
  for_each_array(args.selection, array);
  for_each_array(args.sums, args.selection.table, array);
  for_each_array(args.groups, array);
  array(args.saved_cuts, static_cast<int64_t>(args.selection.table.layers));
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
  const Table<Layer<T>>& table = args.selection.table;
  int levels = args.sums.levels;
  run_phases(
      grid, first, last, [&](int phase) { return selection_and_pattern_phase_is_idle(args, phase - levels); },
      [&](int phase) {
        if (phase == 0) {
          save_cuts(grid, args.cuts_now, args.saved_cuts, table.layers);
          guess_around(grid, args.selection, [&](int layer) { return args.saved_cuts[layer].key; });
          prepare(grid, args.selection);
          sum_squares(grid, table, args.sums, [&](const Layer<T>& row, int quantity, int64_t first, int length) {
            if (quantity == 1) {
              return chunk_sum(grid, length, [&](int j) { return row.scores[first + j]; }, [](T score) { return square(score); });
            }
            GradientReader<T> from = args.gradients(row);
            using Raw = typename GradientReader<T>::Raw;
            return chunk_sum(
                grid, length, [&](int j) { return from.load(first + j); }, [&](Raw raw) { return square(from.gradient(raw)); });
          });
          if (args.groups.any) {
            sum_groups(grid, table, args.groups, 1, [&](int layer) { return ScoreReader<T>{table.rows[layer].scores}; });
          }
        } else if (phase < levels) {
          sum_again(grid, table, args.sums, phase);
        } else {
          if (phase == levels) write_scales(grid, args);
          selection_and_pattern_phase(grid, args, storage, phase - levels);
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
    perturb_kernel(const __grid_constant__ PerturbArgs<T> args, int first, int last) {
  perturb_phases(CudaGrid{}, args, first, last);
}

void perturb_cuda(std::vector<Tensor> scores, std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor kept,
                  std::vector<int64_t> pattern_numbers, Tensor cuts, std::optional<Tensor> squares, Tensor gamma, double eps,
                  bool straight_through, std::vector<Tensor> masked, Tensor new_cuts, Tensor scales) {
  if (scores.empty()) return;
  int64_t layers = static_cast<int64_t>(scores.size());
  check_list("perturb", "scores", scores, scores);
  check_list("perturb", "grads", grads, scores);
  check_list("perturb", "weights", weights, scores);
  check_list("perturb", "masked", masked, scores);
  check_array("perturb", "kept", kept, scores[0], layers, ScalarType::Long);
  check_array("perturb", "cuts", cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  check_array("perturb", "new_cuts", new_cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  check_array("perturb", "gamma", gamma, scores[0], layers, ScalarType::Double);
  check_array("perturb", "scales", scales, scores[0], layers, ScalarType::Double);
  if (squares) check_array("perturb", "squares", *squares, scores[0], layers, ScalarType::Double);
  std::vector<Pattern> patterns = patterns_of("perturb", pattern_numbers, scores);
  Memory memory;
  memory.reads("scores", scores);
  memory.reads("grads", grads);
  memory.reads("weights", weights);
  memory.reads("kept", kept);
  if (cuts.data_ptr() != new_cuts.data_ptr()) memory.reads("cuts", cuts);  // they may be one: the kernel saves them first
  if (squares) memory.reads("squares", *squares);
  memory.reads("gamma", gamma);
  memory.writes("masked", masked);
  memory.writes("new_cuts", new_cuts);
  memory.writes("scales", scales);
  memory.check("perturb: ");
  int device = scores[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);

  dispatch("perturb", scores[0], [&](auto zero) {
    using T = decltype(zero);
    for (int64_t begin = 0; begin < layers; begin += kMaxLayers) {
      PerturbArgs<T> args;
      Selection<T>& s = args.selection;
      for (int64_t i = begin; i < std::min(begin + kMaxLayers, layers); ++i) {
        s.table.push({data<T>(scores[i]), data<T>(grads[i]), data<T>(weights[i]), data<T>(masked[i]), scores[i].numel(), patterns[i]});
      }
      s.kept = data<int64_t>(kept) + begin;
      s.cuts = data<int64_t>(new_cuts) + begin * kCutColumns;
      args.cuts_now = data<int64_t>(cuts) + begin * kCutColumns;
      args.squares = squares ? data<double>(*squares) + begin : nullptr;
      args.straight_through = straight_through;
      args.gammas = data<double>(gamma) + begin;
      args.eps = eps;
      args.scales = data<double>(scales) + begin;
      args.plan();
      Tensor workspace = allocate_workspace(args, scores[0]);
      launch_phases("perturb", perturb_kernel<T>, args, s.table.chunks(), args.phases(), device);
    }
  });
}

}  // namespace s2ap::cuda

STABLE_TORCH_LIBRARY_IMPL(s2ap, CUDA, m) { m.impl("perturb", TORCH_BOX(&s2ap::cuda::perturb_cuda)); }

#endif

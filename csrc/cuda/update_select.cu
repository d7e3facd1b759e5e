// update_select: one SGD step on the scores of all layers, in place, and the masked weights at the new scores; also how many mask entries
// the step changed, and the sums of squares of the new scores, which the next perturb need not take again.
//
// Update   a warp for each chunk: the arithmetic of update (step.cuh), the squares of the new scores in the pinned order (sums.cuh) while
//          they are in registers, and one bit per element for whether it stayed so far.
//          Where straight_through, the gradient is formed from that of the masked weight, the weight and the score's sign where the
//          gradient was taken, which is at s + z if there are ascent gradients. It is not stored.
//          Prepare for the selection, with brackets around the cuts of before the step.         -- grid barrier
// Select   as in selection.cuh; flips are counted against the bits. The levels of the squares' sums ride on these phases.
//
// Whether an element of a pattern stayed depends on more scores than its own. So where there are patterns, a phase in front notes down
// the bits of windows and sums the groups as they were.
//
// Bytes per element, float32: to update, scores and momentum read and written, gradients read: 20, and 1/8 for the bits; straight_through
// reads the weights, 4 more, and the ascent gradients, 4 more. To select 13 (select.cu), and 1/8 for the bits. The floor is what the update
// takes, and 8: the weights and the masked weights. An update and a select of their own take 33 as well, but two launches, and formed
// gradients written and read, and the scores once more for the norm of the next perturb. The bits are 1/32 of the scores' memory.
//
// One cooperative launch for all layers, for the reasons given in select.cu.
#include "pattern.cuh"
#include "step.cuh"

namespace s2ap::cuda {

// Mask: which elements stayed before the step.
template <class T, class Mask>
struct SteppedReader {
  using Raw = T;
  static constexpr bool kFlips = true, kNotes = false;
  const T* scores;
  Mask before;

  S2AP_DEVICE Raw load(int64_t i) const { return scores[i]; }
  S2AP_DEVICE Compute<T> score(Raw raw) const { return widen(raw); }
  S2AP_DEVICE bool was_kept(Raw, int64_t i) const { return before.keeps(0, i); }
  S2AP_DEVICE uint32_t word_before(int64_t i) const { return before.words[i / 32]; }
  S2AP_DEVICE void tally(Raw, Compute<T>, Tally&) const {}
};

// What the update needs of a layer beside its row of the selection.
template <class T>
struct StepLayer {
  T* scores;        // those of the selection
  T* momentum;      // null where there is none
  const T* ascent;  // null where the gradients were taken at the scores
};

template <class T>
struct UpdateSelectArgs {
  Selection<T> selection;
  StepLayer<T> steps[kMaxLayers];
  Sgd<T> sgd;
  bool straight_through;
  const double* scales;     // [layers], of the ascent gradients
  const int64_t* cuts_now;  // [layers, kCutColumns]; may be selection.cuts
  double* squares;          // [layers]
  int front;                // phases before the update: 1 where there are patterns, else 0
  // Workspace, not initialised.
  Sums sums;
  Groups groups;
  Cut* saved_cuts;   // [layers]
  uint32_t* stayed;  // [chunks, kWords]: a bit for each element but those of groups, whether it stayed so far

  S2AP_DEVICE uint32_t* bits(int layer) const { return stayed + selection.table.first_chunk[layer] * kWords; }
  S2AP_DEVICE Cut cut_now(int layer) const { return {cuts_now[layer * kCutColumns + kKey], cuts_now[layer * kCutColumns + kIndex]}; }
  template <int kind = kWeight>
  S2AP_DEVICE auto reader(int layer) const {
    const T* scores = selection.table.rows[layer].scores;
    if constexpr (kind == kGroup) {
      return SteppedReader<T, GroupMask>{scores, GroupMask(groups, selection.table, layer, 1, saved_cuts[layer])};
    } else {
      return SteppedReader<T, BitMask>{scores, {bits(layer)}};
    }
  }
  // Once the table is full.
  void plan() {
    sums.quantities = 1;
    sums.levels = sum_levels(selection.table);
    groups.take(selection.table, 2);
    front = groups.any;
  }
  int phases() const { return front + 1 + selection_and_pattern_phases<T>(groups); }
};

template <class T, class Array>
void for_each_array(UpdateSelectArgs<T>& args, Array&& array) {
  for_each_array(args.selection, array);
  for_each_array(args.sums, args.selection.table, array);
  for_each_array(args.groups, array);
  array(args.saved_cuts, static_cast<int64_t>(args.selection.table.layers));
  array(args.stayed, args.selection.table.chunks() * kWords);
}

// ---- Front

template <class Grid, class T>
S2AP_DEVICE_APART void look_at_patterns(const Grid& grid, const UpdateSelectArgs<T>& args) {
  const Table<Layer<T>>& table = args.selection.table;
  for_each_segment(grid, table, [&](Segment segment) {
    const Layer<T>& row = table.rows[segment.layer];
    if (row.pattern.kind != kWindow) return;
    ScoreReader<T> reader{row.scores};
    WindowMask<ScoreReader<T>> mask{row.pattern, args.cut_now(segment.layer).index, reader};
    uint32_t* bits = args.bits(segment.layer);
    for (int64_t chunk = segment.begin; chunk < segment.end; ++chunk) {
      int64_t first = chunk * kChunk;
      for_each_element<2>(
          grid, chunk_length(row.n, chunk), [&](int j) { return reader.load(first + j); },
          [&](int j, bool valid, T score) {
            uint32_t word = grid.ballot(valid && mask.keeps(key_of(widen(score)), first + j));
            if (grid.lane() == 0 && valid) bits[(first + j) / 32] = word;
          });
    }
  });
  sum_groups(grid, table, args.groups, 1, [&](int layer) { return ScoreReader<T>{table.rows[layer].scores}; });
}

// ---- Update

// The gradient of a score from that of the masked weight, taken at the score or at s + z.
template <class T>
S2AP_DEVICE T formed_gradient(T score, T grad, T weight, bool has_ascent, T ascent, Compute<T> scale) {
  T at = has_ascent ? perturbed(score, score_grad(ascent, weight, score), scale) : score;
  return score_grad(grad, weight, at);
}

template <class Grid, class T>
S2AP_DEVICE void update_and_square(const Grid& grid, const UpdateSelectArgs<T>& args) {
  struct Element {
    T score, grad, momentum, weight, ascent;
  };
  const Table<Layer<T>>& table = args.selection.table;
  for_each_segment(grid, table, [&](Segment segment) {
    const Layer<T>& row = table.rows[segment.layer];
    StepLayer<T> step = args.steps[segment.layer];
    CutMask<KeyOf<T>> mask{args.cut_now(segment.layer)};
    bool plain = row.pattern.kind == kWeight, straight_through = args.straight_through;
    Compute<T> scale = step.ascent ? static_cast<Compute<T>>(args.scales[segment.layer]) : 0;
    uint32_t* bits = args.bits(segment.layer);
    for (int64_t chunk = segment.begin + grid.warp(); chunk < segment.end; chunk += grid.warps()) {
      int64_t first = chunk * kChunk;
      double low = 0, high = 0;
      for_each_element<4>(
          OneWarp{grid.lane()}, chunk_length(row.n, chunk),
          [&](int j) {
            int64_t i = first + j;
            return Element{step.scores[i], row.grads[i], step.momentum ? step.momentum[i] : T{}, straight_through ? row.weights[i] : T{},
                           step.ascent ? step.ascent[i] : T{}};
          },
          [&](int j, bool valid, const Element& element) {
            int64_t i = first + j;
            uint32_t word = grid.ballot(valid && mask.keeps(key_of(widen(element.score)), i));
            if (!valid) return;
            if (plain && grid.lane() == 0) bits[i / 32] = word;
            T grad = element.grad, momentum = element.momentum;
            if (straight_through) {
              grad = formed_gradient(element.score, grad, element.weight, step.ascent != nullptr, element.ascent, scale);
            }
            T score = args.sgd.step(element.score, grad, step.momentum != nullptr, momentum);
            if (step.momentum) step.momentum[i] = momentum;
            step.scores[i] = score;
            if (j / kWarp % 2 == 0) {
              low = add(low, square(score));
            } else {
              high = add(high, square(score));
            }
          });
      double sum = fold_lanes(grid, low, high);
      if (grid.lane() == 0) args.sums.level[0][table.first_chunk[segment.layer] + chunk] = sum;
    }
  });
}

// ---- All of it

template <class Grid, class T>
S2AP_DEVICE void write_squares(const Grid& grid, const UpdateSelectArgs<T>& args) {
  int64_t thread = static_cast<int64_t>(grid.block()) * grid.threads() + grid.thread();
  for (int64_t layer = thread; layer < args.selection.table.layers; layer += static_cast<int64_t>(grid.blocks()) * grid.threads()) {
    args.squares[layer] = sum_of_squares(args.selection.table, args.sums, static_cast<int>(layer), 0);
  }
}

template <class Grid, class T>
S2AP_DEVICE void update_select_phases(const Grid& grid, const UpdateSelectArgs<T>& args, int first, int last) {
  auto& storage = grid.template shared<SelectionStorage<T>>();
  run_phases(
      grid, first, last, [&](int phase) { return selection_and_pattern_phase_is_idle(args, phase - args.front - 1); },
      [&](int phase) {
        int level = phase - args.front;
        if (level < 0) {
          look_at_patterns(grid, args);
        } else if (level == 0) {
          save_cuts(grid, args.cuts_now, args.saved_cuts, args.selection.table.layers);
          guess_around(grid, args.selection, [&](int layer) { return args.saved_cuts[layer].key; });
          prepare(grid, args.selection);
          update_and_square(grid, args);
        } else {
          // Layers have fewer than 2^32 elements, which is three levels: they are over with pass 1, the last phase before apply() that is
          // never left out.
          if (level < args.sums.levels) sum_again(grid, args.selection.table, args.sums, level);
          if (level - 1 == kPasses<T>) write_squares(grid, args);
          selection_and_pattern_phase(grid, args, storage, level - 1);
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
    update_select_kernel(const __grid_constant__ UpdateSelectArgs<T> args, int first, int last) {
  update_select_phases(CudaGrid{}, args, first, last);
}

void update_select_cuda(std::vector<Tensor> scores, std::vector<Tensor> grads, std::vector<Tensor> ascent_grads, Tensor scales,
                        std::vector<Tensor> momentum_buffers, std::vector<Tensor> weights, Tensor kept,
                        std::vector<int64_t> pattern_numbers, Tensor cuts, double lr, double momentum, double dampening,
                        double weight_decay, bool nesterov, bool straight_through, std::vector<Tensor> masked, Tensor new_cuts,
                        Tensor squares) {
  if (scores.empty()) return;
  int64_t layers = static_cast<int64_t>(scores.size());
  bool has_momentum = !momentum_buffers.empty(), has_ascent = !ascent_grads.empty();
  STD_TORCH_CHECK(straight_through || !has_ascent, "update_select: ascent_grads: expected none without straight_through, got ",
                  ascent_grads.size());
  check_list("update_select", "scores", scores, scores);
  check_list("update_select", "grads", grads, scores);
  if (has_ascent) {
    check_list("update_select", "ascent_grads", ascent_grads, scores);
    check_array("update_select", "scales", scales, scores[0], layers, ScalarType::Double);
  }
  if (has_momentum) check_list("update_select", "momentum_buffers", momentum_buffers, scores);
  check_list("update_select", "weights", weights, scores);
  check_list("update_select", "masked", masked, scores);
  check_array("update_select", "kept", kept, scores[0], layers, ScalarType::Long);
  check_array("update_select", "cuts", cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  check_array("update_select", "new_cuts", new_cuts, scores[0], layers * kCutColumns, ScalarType::Long);
  check_array("update_select", "squares", squares, scores[0], layers, ScalarType::Double);
  std::vector<Pattern> patterns = patterns_of("update_select", pattern_numbers, scores);
  Memory memory;
  memory.reads("grads", grads);
  memory.reads("ascent_grads", ascent_grads);
  if (has_ascent) memory.reads("scales", scales);
  memory.reads("weights", weights);
  memory.reads("kept", kept);
  if (cuts.data_ptr() != new_cuts.data_ptr()) memory.reads("cuts", cuts);  // they may be one: the kernel saves them first
  memory.writes("scores", scores);
  memory.writes("momentum_buffers", momentum_buffers);
  memory.writes("masked", masked);
  memory.writes("new_cuts", new_cuts);
  memory.writes("squares", squares);
  memory.check("update_select: ");
  int device = scores[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);

  dispatch("update_select", scores[0], [&](auto zero) {
    using T = decltype(zero);
    for (int64_t begin = 0; begin < layers; begin += kMaxLayers) {
      UpdateSelectArgs<T> args;
      Selection<T>& s = args.selection;
      for (int64_t i = begin; i < std::min(begin + kMaxLayers, layers); ++i) {
        args.steps[s.table.layers] = {data<T>(scores[i]), has_momentum ? data<T>(momentum_buffers[i]) : nullptr,
                                      has_ascent ? data<T>(ascent_grads[i]) : nullptr};
        s.table.push({data<T>(scores[i]), data<T>(grads[i]), data<T>(weights[i]), data<T>(masked[i]), scores[i].numel(), patterns[i]});
      }
      s.kept = data<int64_t>(kept) + begin;
      s.cuts = data<int64_t>(new_cuts) + begin * kCutColumns;
      args.sgd = Sgd<T>::of(lr, momentum, dampening, weight_decay, nesterov);
      args.straight_through = straight_through;
      args.scales = has_ascent ? data<double>(scales) + begin : nullptr;
      args.cuts_now = data<int64_t>(cuts) + begin * kCutColumns;
      args.squares = data<double>(squares) + begin;
      args.plan();
      Tensor workspace = allocate_workspace(args, scores[0]);
      launch_phases("update_select", update_select_kernel<T>, args, s.table.chunks(), args.phases(), device);
    }
  });
}

}  // namespace s2ap::cuda

STABLE_TORCH_LIBRARY_IMPL(s2ap, CUDA, m) { m.impl("update_select", TORCH_BOX(&s2ap::cuda::update_select_cuda)); }

#endif

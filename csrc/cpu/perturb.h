// perturb: select at s + z, z = a * g, a = gamma * ||s|| / (||g|| + eps), without ever storing s + z.
//
// What is computed, per layer: the two norms, the scale a, the cut of s + z, the masked weight there, and how far it is from
// the present one: entries whose mask flips against `cuts`, and scores whose sign changes.
//
// How. One pass over s and g sums their squares in the order that reference.sum_of_squares fixes: 64 running sums per chunk of 4096 elements
// (which vectorises, and is the same for any number of threads), then the chunks' sums again. From there on it is select.h, whose reads
// of the scores compute a unit of s + z into the thread's own cache instead.
//
// Bytes per element (float32): 8 for the norms, 8 for the sweep and 8 for the last one, of which a batch that fits the cache reads only
// the first from memory; 4 for w and 4 written.
#pragma once

#include "select.h"

namespace s2ap {

template <class T>
struct PerturbLayer {
  const BitsOf<T>* scores;
  const BitsOf<T>* grad;
  const BitsOf<T>* weight;
  BitsOf<T>* masked;
  int64_t numel;
  int64_t kept;
};

// Sums the chunks' sums as reference.sum_of_squares does, in place.
inline double sum_of_chunks(double* sums, int64_t n) {
  while (n > 1) {
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    for (int64_t c = 0; c < chunks; ++c) {
      double lanes[kLanes] = {};
      const int64_t begin = c * kChunk, end = std::min(n, begin + kChunk);
      for (int64_t i = begin; i < end; ++i) lanes[(i - begin) % kLanes] += sums[i];
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      }
      sums[c] = lanes[0];
    }
    n = chunks;
  }
  return n == 0 ? 0 : sums[0];
}

template <class T>
class PerturbProblem {
 public:
  using Element = T;
  using Bits = BitsOf<T>;
  using Tally = PerturbCounts;
  static constexpr bool kMeasures = true;

  PerturbProblem(const Machine& machine, const std::vector<PerturbLayer<T>>& layers, const int64_t* cuts, double gamma, double eps,
                 int64_t* new_cuts, double* scales)
      : loop_(loops<T>(machine.isa)), layers_(layers), cuts_(cuts), gamma_(gamma), eps_(eps), new_cuts_(new_cuts), scales_(scales) {
    sums_.reserve(layers.size() + 1);
    int64_t total = 0;
    for (const auto& layer : layers) {
      sums_.push_back(total);
      total += (layer.numel + kChunk - 1) / kChunk;
      now_.push_back(cut_of_row<T>(cuts + (&layer - layers.data()) * kCutColumns));
    }
    of_scores_ = std::make_unique_for_overwrite<double[]>(total);
    of_grad_ = std::make_unique_for_overwrite<double[]>(total);
  }

  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t numel(int64_t l) const { return layers_[l].numel; }
  int64_t kept(int64_t l) const { return layers_[l].kept; }
  int64_t* row(int64_t l) const { return new_cuts_ + l * kCutColumns; }

  void measure(int64_t l, int64_t begin, int64_t n) {
    for (int64_t i = begin; i < begin + n; i += kChunk) {
      const int64_t size = std::min(kChunk, begin + n - i), chunk = sums_[l] + i / kChunk;
      of_scores_[chunk] = loop_.chunk_of_squares(layers_[l].scores + i, size);
      of_grad_[chunk] = loop_.chunk_of_squares(layers_[l].grad + i, size);
    }
  }

  void measured(int64_t l) {
    const int64_t chunks = (numel(l) + kChunk - 1) / kChunk;
    const double norm_s = std::sqrt(sum_of_chunks(of_scores_.get() + sums_[l], chunks));
    const double norm_g = std::sqrt(sum_of_chunks(of_grad_.get() + sums_[l], chunks));
    const double scale = norm_g == 0 ? 0 : (gamma_ * norm_s) / (norm_g + eps_);
    scales_[l] = static_cast<double>(static_cast<ComputeOf<T>>(scale));
  }

  const Bits* read(int64_t l, int64_t begin, int64_t n, Bits* space) const {
    const PerturbLayer<T>& layer = layers_[l];
    loop_.move(layer.scores + begin, layer.grad + begin, static_cast<ComputeOf<T>>(scales_[l]), space, n);
    return space;
  }

  void sample(int64_t l, const SamplePlan& plan, Bits* out) const {
    const int64_t n = plan.size();
    const auto both = std::make_unique_for_overwrite<Bits[]>(2 * n);
    gather(plan, layers_[l].scores, both.get());
    gather(plan, layers_[l].grad, both.get() + n);
    loop_.move(both.get(), both.get() + n, static_cast<ComputeOf<T>>(scales_[l]), out, n);
  }

  void apply(int64_t l, int64_t begin, int64_t n, Bits bound, const Bits* moved, Tally& tally) const {
    const int64_t front = std::clamp<int64_t>(now_[l].index - begin, 0, n);
    apply_part(l, begin, front, bound, now_[l].before, moved, tally);
    apply_part(l, begin + front, n - front, bound, now_[l].from, moved + front, tally);
  }

  void add(int64_t l, const Tally& tally) const {
    row(l)[kNans] += tally.nans;
    row(l)[kFlips] += tally.flips;
    row(l)[kSigns] += tally.signs;
  }

 private:
  void apply_part(int64_t l, int64_t begin, int64_t n, Bits bound, Bits bound_now, const Bits* moved, Tally& tally) const {
    const PerturbLayer<T>& layer = layers_[l];
    const PerturbCounts counts =
        loop_.apply_moved(moved, layer.scores + begin, layer.weight + begin, layer.masked + begin, n, bound, bound_now);
    tally.nans += counts.nans;
    tally.flips += counts.flips;
    tally.signs += counts.signs;
  }

  const Loops<T>& loop_;
  const std::vector<PerturbLayer<T>>& layers_;
  const int64_t* cuts_;
  double gamma_, eps_;
  int64_t* new_cuts_;
  double* scales_;
  std::vector<Cut<Bits>> now_;
  std::vector<int64_t> sums_;  // where each layer's chunks begin in the two below
  std::unique_ptr<double[]> of_scores_, of_grad_;
};

// cuts: int64 [L, 5], those of the scores; new_cuts: int64 [L, 5] and scales: double [L], written.
template <class T>
void perturb(const Machine& machine, const std::vector<PerturbLayer<T>>& layers, const int64_t* cuts, double gamma, double eps,
             int64_t* new_cuts, double* scales) {
  PerturbProblem<T> problem(machine, layers, cuts, gamma, eps, new_cuts, scales);
  Selection<PerturbProblem<T>>(machine, problem).run();
}

}  // namespace s2ap

// perturb: select at s + z, z = a * g, a = gamma * ||s|| / (||g|| + eps), without ever storing s + z. Each layer has its own gamma.
//
// What is computed, per layer: the two norms, the scale a, the cut of s + z, the masked weight there, and how far it is from
// the present one: entries whose mask flips against `cuts`, and scores whose sign changes.
//
// How. One pass over s and g sums their squares in the order that reference.sum_of_squares fixes: 64 running sums per chunk of 4096
// elements (which vectorises, and is the same for any number of threads), then the chunks' sums again. From there on it is select.h, whose
// reads of the scores compute a unit of s + z into the thread's own cache instead.
//
// A layer's present mask follows from its scores and `cuts`, but for groups: their present sums are taken beforehand.
//
// The gradient may be given as that of the masked weight; then that of the scores, grad * w * sign(s), is formed chunk by chunk where it is
// read, which costs the reading of w, and is never stored. And where the scores' sum of squares is known, it is not taken.
//
// Bytes per element (float32): 8 for the norms, 8 for the sweep and 8 for the last one, of which a batch that fits the cache reads only
// the first from memory; 4 for w and 4 written.
#pragma once

#include "select.h"

namespace s2ap {

template <class T>
struct PerturbLayer {
  const BitsOf<T>* scores;
  const BitsOf<T>* grad;  // of the scores, or with Ascent::straight_through of the masked weight
  const BitsOf<T>* weight;
  BitsOf<T>* masked;
  int64_t numel;
  int64_t kept;
  Pattern pattern = {};
};

struct Ascent {
  const double* gammas;  // [L]
  double eps;
  bool straight_through = false;    // grad is that of the masked weight
  const double* squares = nullptr;  // [L], the scores' sums of squares where they are known
};

template <class T>
class PerturbProblem {
 public:
  using Element = T;
  using Bits = BitsOf<T>;
  using Tally = PerturbCounts;
  static constexpr bool kMeasures = true;

  PerturbProblem(const Machine& machine, const std::vector<PerturbLayer<T>>& layers, const Ascent& ascent, const int64_t* cuts,
                 int64_t* new_cuts, double* scales)
      : loop_(loops<T>(machine.isa)), layers_(layers), ascent_(ascent), new_cuts_(new_cuts), scales_(scales) {
    sums_.reserve(layers.size() + 1);
    int64_t total = 0;
    for (const auto& layer : layers) {
      sums_.push_back(total);
      total += (layer.numel + kChunk - 1) / kChunk;
      const int64_t* row = cuts + (&layer - layers.data()) * kCutColumns;
      now_.push_back(cut_of_row<T>(row));
      group_sums_now_.emplace_back(layer.pattern.kind == kGroup ? layer.pattern.size : 0);
      pattern_now_.emplace_back(row, group_sums_now_.back().data());
    }
    of_scores_ = std::make_unique_for_overwrite<double[]>(total);
    of_grad_ = std::make_unique_for_overwrite<double[]>(total);
  }

  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t numel(int64_t l) const { return layers_[l].numel; }
  int64_t kept(int64_t l) const { return layers_[l].kept; }
  Pattern pattern(int64_t l) const { return layers_[l].pattern; }
  int64_t* row(int64_t l) const { return new_cuts_ + l * kCutColumns; }

  bool notes(int64_t l) const { return pattern(l).kind == kGroup; }
  void note(int64_t l, const Share& share) {
    const auto read_now = [&](const Runs& runs, Bits* space) { return collect(runs, layers_[l].scores, space); };
    group_sums(loop_, pattern(l), numel(l), share, read_now, group_sums_now_[l].data());
  }

  void measure(int64_t l, int64_t begin, int64_t n) {
    Bits formed[kChunk];
    for (int64_t i = begin; i < begin + n; i += kChunk) {
      const int64_t size = std::min(kChunk, begin + n - i), chunk = sums_[l] + i / kChunk;
      if (ascent_.squares == nullptr) of_scores_[chunk] = loop_.chunk_of_squares(layers_[l].scores + i, size);
      of_grad_[chunk] = loop_.chunk_of_squares(gradient(l, i, size, formed), size);
    }
  }

  void measured(int64_t l) {
    const int64_t chunks = (numel(l) + kChunk - 1) / kChunk;
    const double square = ascent_.squares ? ascent_.squares[l] : sum_of_chunks(of_scores_.get() + sums_[l], chunks);
    const double norm_s = std::sqrt(square), norm_g = std::sqrt(sum_of_chunks(of_grad_.get() + sums_[l], chunks));
    const double gamma = ascent_.gammas[l];  // 0 gives 0 even where a norm is infinite
    const double scale = gamma == 0 || norm_g == 0 ? 0 : (gamma * norm_s) / (norm_g + ascent_.eps);
    scales_[l] = static_cast<double>(static_cast<ComputeOf<T>>(scale));
  }

  const Bits* read(int64_t l, int64_t begin, int64_t n, Bits* space) const {
    Bits formed[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t size = std::min(kChunk, n - i);
      const Bits* grad = gradient(l, begin + i, size, formed);
      loop_.move(layers_[l].scores + begin + i, grad, static_cast<ComputeOf<T>>(scales_[l]), space + i, size);
    }
    return space;
  }

  template <class Places>
  void read_scattered(int64_t l, const Places& places, Bits* out) const {
    const int64_t n = places.size();
    const auto space = std::make_unique_for_overwrite<Bits[]>(4 * n);
    Bits *scores = space.get(), *grad = scores + n, *weight = grad + n, *formed = weight + n;
    gather(places, layers_[l].scores, scores);
    gather(places, layers_[l].grad, grad);
    if (ascent_.straight_through) {
      gather(places, layers_[l].weight, weight);
      loop_.form(grad, weight, scores, formed, n);
      grad = formed;
    }
    loop_.move(scores, grad, static_cast<ComputeOf<T>>(scales_[l]), out, n);
  }

  void apply(int64_t l, int64_t begin, int64_t n, const Cut<Bits>& cut, const Bits* moved, Tally& tally) const {
    const PerturbLayer<T>& layer = layers_[l];
    in_parts(cut, begin, n, [&](int64_t from, int64_t size, Bits bound) {
      in_parts(now_[l], begin + from, size, [&](int64_t part, int64_t part_size, Bits bound_now) {
        const int64_t at = from + part, i = begin + at;
        tally += loop_.apply_moved(moved + at, layer.scores + i, layer.weight + i, layer.masked + i, part_size, bound, bound_now);
      });
    });
  }

  void apply(int64_t l, const Tile& tile, const Bits* mask, const Bits* moved, Tally& tally) const {
    const PerturbLayer<T>& layer = layers_[l];
    alignas(64) Bits space[kTile], mask_now[kTile];
    keep_in_tile(loop_, layer.pattern, pattern_now_[l], tile, collect(tile.elements, layer.scores, space), mask_now);
    tile.elements.for_each_piece([&](int64_t i, int64_t at, int64_t n) {
      tally += loop_.apply_moved(moved + at, layer.scores + i, layer.weight + i, layer.masked + i, n, mask + at, mask_now + at);
    });
  }

  void add(int64_t l, const Tally& tally) const {
    row(l)[kNans] += tally.nans;
    row(l)[kFlips] += tally.flips;
    row(l)[kSigns] += tally.signs;
  }

 private:
  // The gradient of n scores: as given, or formed in `space`.
  const Bits* gradient(int64_t l, int64_t begin, int64_t n, Bits* space) const {
    const PerturbLayer<T>& layer = layers_[l];
    if (!ascent_.straight_through) return layer.grad + begin;
    loop_.form(layer.grad + begin, layer.weight + begin, layer.scores + begin, space, n);
    return space;
  }

  const Loops<T>& loop_;
  const std::vector<PerturbLayer<T>>& layers_;
  const Ascent& ascent_;
  int64_t* new_cuts_;
  double* scales_;
  std::vector<Cut<Bits>> now_;
  std::vector<PatternCut> pattern_now_;  // the same for layers with a pattern
  std::vector<std::vector<uint64_t>> group_sums_now_;
  std::vector<int64_t> sums_;  // where each layer's chunks begin in the two below
  std::unique_ptr<double[]> of_scores_, of_grad_;
};

// cuts: int64 [L, 5], those of the scores; new_cuts: int64 [L, 5] and scales: double [L], written.
template <class T>
void perturb(const Machine& machine, const std::vector<PerturbLayer<T>>& layers, const Ascent& ascent, const int64_t* cuts,
             int64_t* new_cuts, double* scales) {
  PerturbProblem<T> problem(machine, layers, ascent, cuts, new_cuts, scales);
  Selection<PerturbProblem<T>>(machine, problem).run();
}

}  // namespace s2ap

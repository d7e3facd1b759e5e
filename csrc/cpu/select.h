// select: for each layer, keep the `kept` weights with the largest |score| and zero the others.
//
// What is computed. Elements rank by (|s|, index); those from the cut (KEY, INDEX) upwards stay (s2ap_ext/reference.py). So the work is
// to find the kept-th largest magnitude T and, among the elements equal to T, the index of the first that stays.
//
// How, for a layer:
//   1. A small sample of the scores gives a bracket [lo, hi) that holds T almost surely.
//   2. One sweep over the scores counts the magnitudes above the bracket and compacts those inside it (about 3 % of them).
//   3. Bisection on the bits, among those few, gives T; one unit is looked at again for the index of the last tie.
//   4. One sweep writes masked = (|s|, i) >= cut ? w : 0 and counts NaN.
// The counts of step 2 prove whether T lies inside, so the sample only affects speed. If T is outside, the next sweep takes the
// bracket's own edge as a bracket of width 1 (many equal scores make T such an edge, and then counting is all there is to do); if
// that misses too, or if too many elements lie inside, 2048-bin histograms narrow the bracket, at most three for float32. Equal
// scores, or scores arranged to mislead the sample, cost some more sweeps and never a wrong bit.
//
// All layers go through one queue of tasks, each a unit of 16384 elements and a step, which the threads take in order: one start of the
// threads per call, and layers of any size balance. A task waits while its layer's previous step is not finished by the threads that
// took it. Small layers take their steps in groups, large ones alone, so that a step finds in the cache what the one before it read.
// Layers of up to one unit are finished by one thread in one go.
//
// Bytes per element (float32): 4 in step 2; 4 + 4 read and 4 written in step 4, the scores once more but from the cache.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "loops.h"

namespace s2ap {

// A unit is what one thread sweeps at once: consecutive elements of one layer, a multiple of kChunk.
constexpr int64_t kUnit = 4 * kChunk;
// Layers take their steps together until they have this many elements.
constexpr int64_t kGroup = int64_t{1} << 18;

constexpr int kDigitBits = 11;

// The cut of a layer, in terms of magnitudes.
template <class Bits>
struct Cut {
  Bits before = kBeyond<Bits>;  // bound for elements in front of `index`
  Bits from = kBeyond<Bits>;    // bound from `index` on
  int64_t index = 0;
};

// The cut that a row of `cuts` describes.
template <class T>
Cut<BitsOf<T>> cut_of_row(const int64_t* row) {
  const int64_t key = row[kKey];
  return {key == kKeepNone ? kBeyond<BitsOf<T>> : magnitude_at_least<T>(key + 1), magnitude_at_least<T>(key), row[kIndex]};
}

template <class Bits>
struct Rank {
  Bits magnitude;  // the rank-th largest
  int64_t above;   // how many are larger
};

// The rank-th largest (1 is the largest) of n magnitudes that all lie in [lo, hi), by bisection on the bits. Every pass is a
// counting loop; once a quarter is left it is compacted into `scratch`, which holds n / 4 elements and kStoreSlack bytes.
template <class T>
Rank<BitsOf<T>> rank_largest(const Loops<T>& loop, const BitsOf<T>* x, int64_t n, int64_t rank, BitsOf<T> lo, BitsOf<T> hi,
                             BitsOf<T>* scratch) {
  int64_t above = 0, inside = n;  // magnitudes >= hi, and in [lo, hi), of all
  int64_t beyond = 0;             // magnitudes >= hi among the n that x has now
  while (hi - lo > 1) {
    if (inside <= n / 4) {
      n = loop.sweep(x, n, lo, hi, scratch).inside;
      x = scratch;
      beyond = 0;
    }
    const BitsOf<T> middle = static_cast<BitsOf<T>>(lo + (hi - lo) / 2);
    const int64_t at_least = loop.count_at_least(x, n, middle), upper = at_least - beyond;
    if (rank <= above + upper) {
      lo = middle;
      inside = upper;
    } else {
      hi = middle;
      above += upper;
      inside -= upper;
      beyond = at_least;
    }
  }
  return {lo, above};
}

// Where the sample of a layer of n elements is: runs of neighbours (a quarter of the cache misses of single elements), one at a
// fixed, irregular place in each of `runs` equal parts.
struct SamplePlan {
  static constexpr int64_t kRun = 4;
  int64_t runs, part;

  explicit SamplePlan(int64_t n) : runs(std::clamp<int64_t>(n / 32, 2048, 16384) / kRun), part(n / runs) {}
  int64_t size() const { return runs * kRun; }
  int64_t begin(int64_t i) const {
    const uint64_t scattered = (static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull) >> 40;  // 24 bits
    return i * part + static_cast<int64_t>((scattered * static_cast<uint64_t>(part - kRun + 1)) >> 24);
  }
};

// Copies the sampled elements of x to `sample`.
template <class Bits>
void gather(const SamplePlan& plan, const Bits* x, Bits* sample) {
  constexpr int64_t kAhead = 16;
  for (int64_t i = 0; i < plan.runs; ++i) {
    __builtin_prefetch(x + plan.begin(std::min(i + kAhead, plan.runs - 1)));
    memcpy(sample + i * SamplePlan::kRun, x + plan.begin(i), SamplePlan::kRun * sizeof(Bits));
  }
}

// Searches the cuts of all layers and applies them. Problem says what the layers are:
//   Element                                             the element type T
//   int64_t layers(), numel(l), kept(l); int64_t* row(l)
//   const Bits* read(l, begin, n, space)                the bits to rank; may be computed into `space` (kUnit elements)
//   void sample(l, plan, out)                           the sampled ones of them
//   void apply(l, begin, n, bound, x, Tally&)           x: what read gave for these elements
//   void add(l, Tally)
//   kMeasures; void measure(l, begin, n), measured(l)   a first pass over a layer, before anything is read (perturb's norms)
template <class Problem>
class Selection {
 public:
  using T = typename Problem::Element;
  using Bits = BitsOf<T>;
  using Tally = typename Problem::Tally;

  Selection(const Machine& machine, Problem& problem) : machine_(machine), problem_(problem), loop_(loops<T>(machine.isa)) { plan(); }

  void run() {
    run_tasks();
    while (plan_missed()) run_tasks();
    for (const Unit& u : units_) problem_.add(layers_[u.layer].id, u.tally);
  }

 private:
  enum class Step { kSmall, kMeasure, kGuess, kSearch, kApply };
  struct Task {
    Step step;
    int64_t first, last;  // kSmall: of small_; kGuess: a layer; otherwise a unit
  };

  struct Unit {
    int64_t layer;
    int64_t begin, n;
    SweepCounts counts = {};
    int64_t offset = 0;  // of its compacted magnitudes among the layer's
    Tally tally = {};
  };

  // What is known of a layer of more than one unit. kMissed: the search needs another sweep.
  enum Stage : int { kUnknown, kBracketed, kFound, kMissed };
  struct Layer {
    int64_t id = 0, n = 0, kept = 0;
    int64_t first_unit = 0, units = 0;
    Cut<Bits> cut;
    // T is in [lo, hi), or that is the guess.
    Bits lo = 0, hi = kBeyond<Bits>;
    bool guess = true;
    std::unique_ptr<int64_t[]> digits;  // where it is to be narrowed by a histogram
    Bits* inside = nullptr;             // room for the compacted magnitudes of all units, and how much of it is taken
    int64_t capacity = 0;
    std::atomic<int64_t> taken{0};
    std::atomic<int64_t> open{0};  // units whose present step is not finished
    std::atomic<int> stage{kUnknown};

    void enter(Stage next) {
      stage.store(next, std::memory_order_release);
      stage.notify_all();
    }
    Stage wait_beyond(Stage last) {
      int now;
      while ((now = stage.load(std::memory_order_acquire)) <= last) stage.wait(now);
      return static_cast<Stage>(now);
    }
    // True for the last unit, which sees what all the others wrote.
    bool closes() { return open.fetch_sub(1, std::memory_order_acq_rel) == 1; }
  };

  // Room for one thread's work on a unit.
  struct Space {
    alignas(64) Bits read[kUnit];
    alignas(64) Bits inside[kUnit + kStoreSlack];
  };

  void plan() {
    std::vector<int64_t> large;
    for (int64_t l = 0; l < problem_.layers(); ++l) (problem_.numel(l) > kUnit ? large : small_).push_back(l);

    layers_ = std::vector<Layer>(large.size());
    int64_t room = 0;
    for (size_t i = 0; i < large.size(); ++i) {
      Layer& layer = layers_[i];
      layer.id = large[i];
      layer.n = problem_.numel(layer.id);
      layer.kept = problem_.kept(layer.id);
      layer.first_unit = static_cast<int64_t>(units_.size());
      for (int64_t begin = 0; begin < layer.n; begin += kUnit) {
        units_.push_back({static_cast<int64_t>(i), begin, std::min(kUnit, layer.n - begin)});
      }
      layer.units = static_cast<int64_t>(units_.size()) - layer.first_unit;
      layer.capacity = layer.n / 24 + kUnit / 4;
      room += layer.capacity;
      elements_ += layer.n;
    }
    inside_ = std::make_unique_for_overwrite<Bits[]>(room);
    room = 0;
    for (Layer& layer : layers_) {
      layer.inside = inside_.get() + room;
      room += layer.capacity;
    }

    if (!Problem::kMeasures) {  // otherwise whoever ends a layer's measurement guesses
      for (size_t i = 0; i < layers_.size(); ++i) tasks_.push_back({Step::kGuess, static_cast<int64_t>(i), 0});
    }
    for (size_t begin = 0, end = 0; begin < layers_.size(); begin = end) {
      for (int64_t n = 0; end < layers_.size() && n < kGroup; ++end) n += layers_[end].n;
      for (Step step : {Step::kMeasure, Step::kSearch, Step::kApply}) {
        if (step == Step::kMeasure && !Problem::kMeasures) continue;
        for (size_t i = begin; i < end; ++i) add_tasks(step, layers_[i]);
      }
    }

    // The smallest work comes last, to even out the ends.
    const auto count = static_cast<int64_t>(small_.size());
    for (int64_t first = 0, last; first < count; first = last) {
      int64_t n = 0;
      for (last = first; last < count && n < kUnit; ++last) n += 256 + problem_.numel(small_[last]);
      tasks_.push_back({Step::kSmall, first, last});
      elements_ += n;
    }
  }

  // The layers whose cut is not found yet search on. False if there are none.
  bool plan_missed() {
    tasks_.clear();
    elements_ = 0;
    for (Step step : {Step::kSearch, Step::kApply}) {
      for (Layer& layer : layers_) {
        if (layer.stage == kFound) continue;
        layer.stage = kBracketed;
        add_tasks(step, layer);
        elements_ += layer.n;
      }
    }
    return !tasks_.empty();
  }

  void add_tasks(Step step, Layer& layer) {
    if (step != Step::kApply) layer.open = layer.units;
    for (int64_t u = layer.first_unit; u < layer.first_unit + layer.units; ++u) tasks_.push_back({step, u, 0});
  }

  void run_tasks() {
    for_each(machine_, static_cast<int64_t>(tasks_.size()), elements_, [&](int64_t i) {
      const Task& task = tasks_[i];
      switch (task.step) {
        case Step::kSmall:
          for (int64_t l = task.first; l < task.last; ++l) finish_small(small_[l]);
          return;
        case Step::kMeasure: return measure(units_[task.first]);
        case Step::kGuess: return guess_bracket(layers_[task.first]);
        case Step::kSearch: return search(units_[task.first]);
        case Step::kApply: return apply(units_[task.first]);
      }
    });
  }

  void finish_small(int64_t id) {
    const int64_t n = problem_.numel(id), kept = problem_.kept(id);
    Space space;
    if constexpr (Problem::kMeasures) {
      problem_.measure(id, 0, n);
      problem_.measured(id);
    }
    const Bits* x = problem_.read(id, 0, n, space.read);
    Cut<Bits> cut;
    if (!keeps_all_or_none(id, n, kept, cut)) {
      const Rank<Bits> t = rank_largest(loop_, x, n, kept, Bits{0}, kBeyond<Bits>, space.inside);
      cut = found(id, t, index_of_tie(x, n, t.magnitude, kept - t.above));
    }
    Tally tally = {};
    apply(id, 0, n, cut, x, tally);
    problem_.add(id, tally);
  }

  bool keeps_all_or_none(int64_t id, int64_t n, int64_t kept, Cut<Bits>& cut) {
    int64_t* row = problem_.row(id);
    std::fill(row, row + kCutColumns, 0);
    if (kept != 0 && kept != n) return false;
    if (kept == 0) row[kKey] = kKeepNone;
    cut = cut_of_row<T>(row);
    return true;
  }

  Cut<Bits> found(int64_t id, const Rank<Bits>& t, int64_t index) {
    problem_.row(id)[kKey] = cut_key<T>(t.magnitude);
    problem_.row(id)[kIndex] = index;
    return {static_cast<Bits>(t.magnitude + 1), t.magnitude, index};
  }

  // The index of the rank-th last of the elements with this magnitude.
  int64_t index_of_tie(const Bits* x, int64_t n, Bits magnitude, int64_t rank) {
    constexpr int64_t kStep = 256;
    for (int64_t end = n; end > 0;) {
      const int64_t begin = (end - 1) / kStep * kStep;
      const int64_t here = count_equal(x + begin, end - begin, magnitude);
      if (here >= rank) {
        for (int64_t i = end - 1;; --i) {
          if ((x[i] & kMagnitude<Bits>) == magnitude && --rank == 0) return i;
        }
      }
      rank -= here;
      end = begin;
    }
    return 0;
  }

  int64_t count_equal(const Bits* x, int64_t n, Bits magnitude) {
    return loop_.count_at_least(x, n, magnitude) - loop_.count_at_least(x, n, static_cast<Bits>(magnitude + 1));
  }

  void measure(Unit& u) {
    if constexpr (Problem::kMeasures) {
      Layer& layer = layers_[u.layer];
      problem_.measure(layer.id, u.begin, u.n);
      if (!layer.closes()) return;
      problem_.measured(layer.id);
      layer.open = layer.units;
      guess_bracket(layer);
    }
  }

  // A bracket around the kept-th largest, four standard deviations of a sample's rank to either side.
  void guess_bracket(Layer& layer) {
    if (keeps_all_or_none(layer.id, layer.n, layer.kept, layer.cut)) return layer.enter(kFound);
    const SamplePlan plan(layer.n);
    const int64_t size = plan.size();
    const auto sample = std::make_unique_for_overwrite<Bits[]>(size);
    problem_.sample(layer.id, plan, sample.get());
    const double fraction = static_cast<double>(layer.kept) / static_cast<double>(layer.n), m = static_cast<double>(size);
    const double margin = 4 * std::sqrt(m * fraction * (1 - fraction)) + 4;
    const auto upper = static_cast<int64_t>(m * fraction - margin), lower = static_cast<int64_t>(m * fraction + margin);
    const auto scratch = std::make_unique_for_overwrite<Bits[]>(size / 4 + kStoreSlack);
    const auto ranked = [&](int64_t rank) {
      return rank_largest(loop_, sample.get(), size, rank, Bits{0}, kBeyond<Bits>, scratch.get()).magnitude;
    };
    layer.hi = upper >= 1 ? ranked(upper) : kBeyond<Bits>;
    layer.lo = lower <= size ? static_cast<Bits>(ranked(lower) + 1) : Bits{0};
    if (layer.lo > layer.hi) {  // one value all around: that value alone
      layer.lo = layer.hi;
      layer.hi = static_cast<Bits>(layer.lo + 1);
    }
    layer.enter(kBracketed);
  }

  bool stores(const Layer& layer) const { return layer.hi - layer.lo > 1; }  // a bracket of width 1 holds equal magnitudes

  void search(Unit& u) {
    Layer& layer = layers_[u.layer];
    if (layer.wait_beyond(kUnknown) == kFound) return;
    if (layer.digits) {
      count_digits(layer, u);
      if (layer.closes()) read_digits(layer);
    } else {
      sweep(layer, u);
      if (layer.closes()) read_sweep(layer);
    }
  }

  void sweep(Layer& layer, Unit& u) {
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    u.counts = loop_.sweep(x, u.n, layer.lo, layer.hi, space.inside);
    if (!stores(layer)) return;
    u.offset = layer.taken.fetch_add(u.counts.inside, std::memory_order_relaxed);
    if (u.offset + u.counts.inside <= layer.capacity) std::copy_n(space.inside, u.counts.inside, layer.inside + u.offset);
  }

  void read_sweep(Layer& layer) {
    SweepCounts all;
    for (int64_t i = 0; i < layer.units; ++i) {
      const SweepCounts& counts = units_[layer.first_unit + i].counts;
      all.above += counts.above;
      all.inside += counts.inside;
    }
    const bool below = layer.kept > all.above + all.inside, above = layer.kept <= all.above;
    if (!below && !above) {
      if (!stores(layer)) {
        found_in_layer(layer, {layer.lo, all.above});
      } else if (all.inside <= layer.capacity) {
        const auto scratch = std::make_unique_for_overwrite<Bits[]>(all.inside / 4 + kStoreSlack);
        Rank<Bits> t = rank_largest(loop_, layer.inside, all.inside, layer.kept - all.above, layer.lo, layer.hi, scratch.get());
        t.above += all.above;
        for (int64_t i = 0; i < layer.units; ++i) {
          Unit& u = units_[layer.first_unit + i];
          u.counts.inside = count_equal(layer.inside + u.offset, u.counts.inside, t.magnitude);
        }
        found_in_layer(layer, t);
      } else {
        start_digits(layer);
      }
      return;
    }
    if (layer.guess && layer.hi - layer.lo != 1) {  // the edge next to which T lies may be T itself, many times over
      layer.guess = false;
      if (above) {
        layer.lo = layer.hi;
      } else {
        --layer.lo;
      }
      layer.hi = static_cast<Bits>(layer.lo + 1);
      layer.enter(kMissed);
    } else if (above) {
      layer.lo = layer.hi;
      layer.hi = kBeyond<Bits>;
      start_digits(layer);
    } else {
      layer.hi = layer.lo;
      layer.lo = 0;
      start_digits(layer);
    }
  }

  // T and the number of its equals in each unit are known; finds the index where the ties are cut.
  void found_in_layer(Layer& layer, const Rank<Bits>& t) {
    int64_t rank = layer.kept - t.above;
    int64_t i = layer.first_unit + layer.units - 1;
    for (; rank > units_[i].counts.inside; --i) rank -= units_[i].counts.inside;
    const Unit& u = units_[i];
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    layer.cut = found(layer.id, t, u.begin + index_of_tie(x, u.n, t.magnitude, rank));
    layer.enter(kFound);
  }

  int shift(const Layer& layer) const {
    const Bits last = static_cast<Bits>(layer.hi - layer.lo - 1);
    return std::max(0, static_cast<int>(std::bit_width(last)) - kDigitBits);
  }

  void start_digits(Layer& layer) {
    layer.digits = std::make_unique<int64_t[]>((size_t{1} << kDigitBits) + 1);  // the last one: magnitudes >= hi
    layer.enter(kMissed);
  }

  void count_digits(Layer& layer, Unit& u) {
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    const SweepCounts counts = loop_.sweep(x, u.n, layer.lo, layer.hi, space.inside);
    uint32_t bins[size_t{1} << kDigitBits] = {};
    const int by = shift(layer);
    for (int64_t i = 0; i < counts.inside; ++i) ++bins[static_cast<Bits>(space.inside[i] - layer.lo) >> by];
    for (size_t bin = 0; bin < std::size(bins); ++bin) {
      if (bins[bin]) std::atomic_ref(layer.digits[bin]).fetch_add(bins[bin], std::memory_order_relaxed);
    }
    std::atomic_ref(layer.digits[std::size(bins)]).fetch_add(counts.above, std::memory_order_relaxed);
  }

  void read_digits(Layer& layer) {
    int64_t bin = int64_t{1} << kDigitBits;
    int64_t above = layer.digits[bin];
    for (--bin; above + layer.digits[bin] < layer.kept; --bin) above += layer.digits[bin];
    const int by = shift(layer);
    const Bits base = layer.lo;
    const Bits end = static_cast<Bits>(base + (static_cast<Bits>(bin + 1) << by));
    layer.lo = static_cast<Bits>(base + (static_cast<Bits>(bin) << by));
    layer.hi = std::min(layer.hi, end < layer.lo ? layer.hi : end);
    if (stores(layer) && layer.digits[bin] > layer.capacity) {
      start_digits(layer);
    } else {
      layer.digits.reset();
      layer.taken = 0;
      layer.enter(kMissed);
    }
  }

  void apply(Unit& u) {
    Layer& layer = layers_[u.layer];
    if (layer.wait_beyond(kBracketed) == kMissed) return;
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    apply(layer.id, u.begin, u.n, layer.cut, x, u.tally);
  }

  // The parts in front of and behind the cut's index, each with its own bound.
  void apply(int64_t id, int64_t begin, int64_t n, const Cut<Bits>& cut, const Bits* x, Tally& tally) {
    const int64_t front = std::clamp<int64_t>(cut.index - begin, 0, n);
    if (front > 0) problem_.apply(id, begin, front, cut.before, x, tally);
    if (front < n) problem_.apply(id, begin + front, n - front, cut.from, x + front, tally);
  }

  const Machine& machine_;
  Problem& problem_;
  const Loops<T>& loop_;
  std::vector<int64_t> small_;  // the layers of up to one unit
  std::vector<Layer> layers_;   // the others
  std::vector<Unit> units_;
  std::unique_ptr<Bits[]> inside_;  // memory of the layers' `inside`
  std::vector<Task> tasks_;
  int64_t elements_ = 0;  // of all tasks
};

template <class T>
struct SelectLayer {
  const BitsOf<T>* scores;
  const BitsOf<T>* weight;
  BitsOf<T>* masked;
  int64_t numel;
  int64_t kept;
};

template <class T>
class SelectProblem {
 public:
  using Element = T;
  using Bits = BitsOf<T>;
  using Tally = int64_t;  // NaN
  static constexpr bool kMeasures = false;

  SelectProblem(const Machine& machine, const std::vector<SelectLayer<T>>& layers, int64_t* cuts)
      : loop_(loops<T>(machine.isa)), layers_(layers), cuts_(cuts) {}

  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t numel(int64_t l) const { return layers_[l].numel; }
  int64_t kept(int64_t l) const { return layers_[l].kept; }
  int64_t* row(int64_t l) const { return cuts_ + l * kCutColumns; }
  const Bits* read(int64_t l, int64_t begin, int64_t, Bits*) const { return layers_[l].scores + begin; }
  void sample(int64_t l, const SamplePlan& plan, Bits* out) const { gather(plan, layers_[l].scores, out); }
  void apply(int64_t l, int64_t begin, int64_t n, Bits bound, const Bits* x, Tally& nans) const {
    nans += loop_.apply(x, layers_[l].weight + begin, layers_[l].masked + begin, n, bound);
  }
  void add(int64_t l, Tally nans) const { row(l)[kNans] += nans; }

 private:
  const Loops<T>& loop_;
  const std::vector<SelectLayer<T>>& layers_;
  int64_t* cuts_;
};

// cuts: int64 [L, 5], written.
template <class T>
void select(const Machine& machine, const std::vector<SelectLayer<T>>& layers, int64_t* cuts) {
  SelectProblem<T> problem(machine, layers, cuts);
  Selection<SelectProblem<T>>(machine, problem).run();
}

}  // namespace s2ap

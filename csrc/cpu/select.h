// select: for each layer, keep the `kept` weights with the largest |score| and zero the others.
//
// What is computed. Elements rank by (|s|, index); those from the cut (KEY, INDEX) upwards stay (s2ap_ext/reference.py). So the work is to find
// the kept-th largest magnitude T and, among the elements equal to T, the index of the first that stays.
//
// How. Three streaming passes' worth of memory traffic, whatever the data:
//   1. A small sample of the scores gives a bracket [lo, hi) that holds T almost surely.
//   2. One sweep over the scores counts the magnitudes above the bracket and compacts those inside it (2-4 % of them).
//   3. Bisection on the bits, among those few, gives T; one sub-chunk is looked at again for the index of the last tie.
//   4. One sweep writes masked = (|s|, i) >= cut ? w : 0 and counts NaN.
// The counts of step 2 prove whether T lies inside, so the sample only affects speed. If T is outside, the next sweep takes the bracket's
// own edge as a bracket of width 1 (many equal scores make T such an edge, and then counting is all there is to do); if that
// misses too, or if too many elements lie inside, 2048-bin histograms narrow the bracket, at most three for float32. An empty
// sample, equal scores, or scores arranged to mislead the sample cost some more sweeps and never a wrong bit.
//
// Bytes per element (float32): 4 in step 2; 4 + 4 read and 4 written in step 4. Layers are searched in batches that fit the cache,
// so the second read of the scores is not from memory. Layers of up to kUnit elements are finished by one thread in one go.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "loops.h"

namespace s2ap {

// A unit is what one thread sweeps at once: consecutive elements of one layer, a multiple of kChunk.
constexpr int64_t kUnit = 4 * kChunk;
// Layers are searched together until they have this many elements: enough for all threads, few enough for the last-level cache.
constexpr int64_t kBatch = int64_t{1} << 21;

constexpr int kDigitBits = 11;

// The cut of a layer, in terms of magnitudes.
template <class Bits>
struct Cut {
  Bits before = kBeyond<Bits>;  // bound for elements in front of `index`
  Bits from = kBeyond<Bits>;    // bound from `index` on
  int64_t index = 0;

  Bits bound(int64_t i) const { return i < index ? before : from; }
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

  explicit SamplePlan(int64_t n) : runs(std::clamp<int64_t>(n / 16, 2048, 16384) / kRun), part(n / runs) {}
  int64_t size() const { return runs * kRun; }
  int64_t begin(int64_t i) const {
    const uint64_t scattered = (static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull) >> 40;
    return i * part + static_cast<int64_t>(scattered % static_cast<uint64_t>(part - kRun + 1));
  }
};

// Searches the cuts of all layers and applies them. Problem says what the layers are:
//   Element                                           the element type T
//   int64_t layers(), numel(l), kept(l); int64_t* row(l)
//   const Bits* read(l, begin, n, Bits* space)        the bits to rank; may be computed into `space` (kUnit elements)
//   void apply(l, begin, n, cut, read's result, Tally&)
//   void measure(l, begin, n), void measured(l)       a first pass over a layer, before anything is read (perturb's norms)
template <class Problem>
class Selection {
 public:
  using T = typename Problem::Element;
  using Bits = BitsOf<T>;

  Selection(const Machine& machine, Problem& problem) : machine_(machine), problem_(problem), loop_(loops<T>(machine.isa)) {}

  void run() {
    std::vector<int64_t> small;
    int64_t small_elements = 0;
    for (int64_t l = 0; l < problem_.layers(); ++l) {
      if (problem_.numel(l) > kUnit) continue;
      small.push_back(l);
      small_elements += problem_.numel(l) + 256;
    }
    for_each(machine_, static_cast<int64_t>(small.size()), small_elements, [&](int64_t i) { finish_small(small[i]); });

    for (int64_t l = 0; l < problem_.layers(); ++l) {
      if (problem_.numel(l) <= kUnit) continue;
      add(l);
      if (elements_ >= kBatch) run_batch();
    }
    if (elements_ > 0) run_batch();
  }

 private:
  enum class Next { kSweep, kDigits, kDone };

  struct Unit {
    int64_t layer;  // in layers_
    int64_t begin, n;
    SweepCounts counts;
    int64_t offset = 0;  // of its compacted magnitudes among the layer's
    typename Problem::Tally tally = {};
  };

  struct Layer {
    int64_t id, n, kept;
    int64_t first_unit, units;
    Next next = Next::kDone;
    // T is in [lo, hi), or that is the guess.
    Bits lo = 0, hi = kBeyond<Bits>;
    bool guess = false;
    int64_t capacity = 0;
    std::unique_ptr<Bits[]> inside;  // the compacted magnitudes of all units
    std::unique_ptr<int64_t[]> digits;
    Cut<Bits> cut;
  };

  // Room for one thread's work on a unit.
  struct Space {
    alignas(64) Bits read[kUnit];
    alignas(64) Bits inside[kUnit + kStoreSlack];
  };

  static int64_t capacity(int64_t n) { return n / 20 + kUnit / 4; }

  void add(int64_t id) {
    Layer layer;
    layer.id = id;
    layer.n = problem_.numel(id);
    layer.kept = problem_.kept(id);
    layer.first_unit = static_cast<int64_t>(units_.size());
    layer.units = (layer.n + kUnit - 1) / kUnit;
    for (int64_t begin = 0; begin < layer.n; begin += kUnit) {
      units_.push_back({static_cast<int64_t>(layers_.size()), begin, std::min(kUnit, layer.n - begin), {}});
    }
    elements_ += layer.n;
    layers_.push_back(std::move(layer));
  }

  void run_batch() {
    if constexpr (Problem::kMeasures) {
      each_unit([&](Unit& u) { problem_.measure(layers_[u.layer].id, u.begin, u.n); });
      each_layer([&](Layer& layer) { problem_.measured(layer.id); });
    }
    used_ = std::make_unique<std::atomic<int64_t>[]>(layers_.size());
    each_layer([&](Layer& layer) { guess_bracket(layer); });
    while (std::any_of(layers_.begin(), layers_.end(), [](const Layer& layer) { return layer.next != Next::kDone; })) {
      each_unit([&](Unit& u) {
        Layer& layer = layers_[u.layer];
        if (layer.next == Next::kSweep) sweep(layer, u);
        if (layer.next == Next::kDigits) count_digits(layer, u);
      });
      each_layer([&](Layer& layer) {
        if (layer.next == Next::kSweep) {
          read_sweep(layer);
        } else if (layer.next == Next::kDigits) {
          read_digits(layer);
        }
      });
    }
    each_unit([&](Unit& u) { apply(u); });
    for (Unit& u : units_) problem_.add(layers_[u.layer].id, u.tally);
    units_.clear();
    layers_.clear();
    elements_ = 0;
  }

  template <class F>
  void each_unit(const F& f) {
    for_each(machine_, static_cast<int64_t>(units_.size()), elements_, [&](int64_t i) { f(units_[i]); });
  }

  template <class F>
  void each_layer(const F& f) {
    for_each(machine_, static_cast<int64_t>(layers_.size()), elements_, [&](int64_t i) { f(layers_[i]); });
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
    typename Problem::Tally tally = {};
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

  // A bracket around the kept-th largest, four standard deviations of a sample's rank to either side.
  void guess_bracket(Layer& layer) {
    if (keeps_all_or_none(layer.id, layer.n, layer.kept, layer.cut)) return;
    const SamplePlan plan(layer.n);
    const int64_t size = plan.size();
    const auto sample = std::make_unique_for_overwrite<Bits[]>(size);
    Bits space[SamplePlan::kRun];
    for (int64_t i = 0; i < plan.runs; ++i) {
      const Bits* x = problem_.read(layer.id, plan.begin(i), SamplePlan::kRun, space);
      for (int64_t j = 0; j < SamplePlan::kRun; ++j) sample[i * SamplePlan::kRun + j] = x[j] & kMagnitude<Bits>;
    }
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
    layer.guess = true;
    layer.capacity = capacity(layer.n);
    layer.inside = std::make_unique_for_overwrite<Bits[]>(layer.capacity);
    layer.next = Next::kSweep;
  }

  bool stores(const Layer& layer) const { return layer.hi - layer.lo > 1; }  // a bracket of width 1 holds equal magnitudes

  void sweep(Layer& layer, Unit& u) {
    Space space;
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    u.counts = loop_.sweep(x, u.n, layer.lo, layer.hi, space.inside);
    if (!stores(layer)) return;
    u.offset = used_[u.layer].fetch_add(u.counts.inside, std::memory_order_relaxed);
    if (u.offset + u.counts.inside <= layer.capacity) {
      std::copy_n(space.inside, u.counts.inside, layer.inside.get() + u.offset);
    }
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
        Rank<Bits> t = rank_largest(loop_, layer.inside.get(), all.inside, layer.kept - all.above, layer.lo, layer.hi, scratch.get());
        t.above += all.above;
        for (int64_t i = 0; i < layer.units; ++i) {
          Unit& u = units_[layer.first_unit + i];
          u.counts.inside = count_equal(layer.inside.get() + u.offset, u.counts.inside, t.magnitude);
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
    layer.next = Next::kDone;
    layer.inside.reset();
  }

  int shift(const Layer& layer) const {
    const Bits last = static_cast<Bits>(layer.hi - layer.lo - 1);
    return std::max(0, static_cast<int>(std::bit_width(last)) - kDigitBits);
  }

  void start_digits(Layer& layer) {
    layer.next = Next::kDigits;
    layer.digits = std::make_unique<int64_t[]>((size_t{1} << kDigitBits) + 1);  // the last one: magnitudes >= hi
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
      used_[&layer - layers_.data()] = 0;
      layer.next = Next::kSweep;
    }
  }

  void apply(Unit& u) {
    Space space;
    const Layer& layer = layers_[u.layer];
    const Bits* x = problem_.read(layer.id, u.begin, u.n, space.read);
    apply(layer.id, u.begin, u.n, layer.cut, x, u.tally);
  }

  // The parts in front of and behind the cut's index, each with its own bound.
  void apply(int64_t id, int64_t begin, int64_t n, const Cut<Bits>& cut, const Bits* x, typename Problem::Tally& tally) {
    const int64_t front = std::clamp<int64_t>(cut.index - begin, 0, n);
    if (front > 0) problem_.apply(id, begin, front, cut.before, x, tally);
    if (front < n) problem_.apply(id, begin + front, n - front, cut.from, x + front, tally);
  }

  const Machine& machine_;
  Problem& problem_;
  const Loops<T>& loop_;
  std::vector<Layer> layers_;
  std::vector<Unit> units_;
  std::unique_ptr<std::atomic<int64_t>[]> used_;  // how much of each layer's `inside` is taken
  int64_t elements_ = 0;
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
